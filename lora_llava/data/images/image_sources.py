"""Image sources: open images lazily, only inside their folder, never from a URL, up to a size limit."""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from PIL import Image, UnidentifiedImageError

from lora_llava.core.errors import RefusedError
from lora_llava.core.retry import retry
from lora_llava.data.images.image_id import ImageId, ImageName
from lora_llava.data.images.image_names import NameIndex, coco_names
from lora_llava.data.images.to_rgb import Background, Converted, to_rgb

if TYPE_CHECKING:
    import torch

_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)
"""Errors of Pillow's size limit; the second is raised if warnings are errors."""


_HEAD_BYTES, _PIXEL_BYTES = 1 << 22, 4
"""Most bytes of an image's file: for metadata such as profiles, and per pixel of uncompressed RGBA."""
_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""Formats that are decoded. Others are refused: for EPS, Pillow would start Ghostscript."""


class BadImageError(RefusedError):
    """An image that is missing, corrupt, too large or out of bounds."""

    kind = "corrupt image"


_Name = TypeVar("_Name", bound=ImageName, contravariant=True)


class Images(Protocol[_Name]):
    """Images that conversations name: by the names of one source, or by `ImageId`."""

    def open(self, name: _Name) -> Image.Image:
        """Return an image in RGB; raise BadImageError if it cannot be used."""
        ...

    def read(self, name: _Name) -> bytes:
        """Return an image's file, undecoded; raise BadImageError if it does not exist."""
        ...

    def label(self, name: _Name) -> str:
        """Return an image's name for messages: its file, or its row in a table."""
        ...


ImageSource = Images[str]
"""The images of one source."""
SplitImages = Images[Any]
"""The images of a split, which opens what its rows name; see `ImageName`."""
PixelLoader = Callable[[Sequence[ImageName]], "torch.Tensor"]
"""Returns the `pixel_values` of the named images, in order: pixels, or the vision tower's features. For a LLaVA-1.6 it
returns all tiles of all images and has a method `sizes`, which returns the images' `image_sizes`."""


@dataclass(frozen=True)
class Pixels:
    """Loader that opens and preprocesses images.

    Args:
        images: Opens the images.
        image_processor: The exported processor's image processor, so that training and serving use the same pixels.
        counted: Height and width by which the tokens of an image were counted; images that are not named may have any.
    """

    images: SplitImages
    image_processor: Any
    counted: Mapping[ImageName, tuple[int, int]] = field(default_factory=dict, repr=False, compare=False)
    _seen: dict[ImageName, tuple[int, int]] = field(default_factory=dict, repr=False, compare=False)

    def __call__(self, names: Sequence[ImageName]) -> torch.Tensor:
        """Return the pixels of these images, float32.

        Returns:
            Shape (images, 3, height, width); of a LLaVA-1.6, (tiles of all images, 3, height, width).
        """
        import torch  # slow to import, and of no use to those that open images alone

        if self.sizes is not None:
            return torch.cat([self._tiles(name) for name in names])
        opened = [self.images.open(name) for name in names]
        pixels: torch.Tensor = self.image_processor(opened, return_tensors="pt")["pixel_values"]
        return pixels

    @property
    def sizes(self) -> Callable[[Sequence[ImageName]], torch.Tensor] | None:
        """What returns the `image_sizes` of named images, int64 of shape (images, 2); None for a LLaVA without tiles.

        An image that was loaded before is not opened again.
        """
        return self._sizes if hasattr(self.image_processor, "image_grid_pinpoints") else None

    def _tiles(self, name: ImageName) -> torch.Tensor:
        now = (image := self.images.open(name)).height, image.width
        if (before := self.counted.get(name, now)) not in (now, (0, 0)):
            sizes = f"has {now[1]} x {now[0]} pixels now, and {before[1]} x {before[0]} when its tokens were counted"
            raise BadImageError(f"image {self.images.label(name)} {sizes}; restore it, or start again", "changed image")
        self._seen[name] = now
        tiles: torch.Tensor = self.image_processor([image], return_tensors="pt")["pixel_values"][0]
        return tiles

    def _sizes(self, names: Sequence[ImageName]) -> torch.Tensor:
        import torch

        for name in names:
            if name not in self._seen:
                image = self.images.open(name)
                self._seen[name] = image.height, image.width
        return torch.tensor([self._seen[name] for name in names])


def read_rgb(file: Path | io.BytesIO, name: str, max_pixels: int, background: Background = "white") -> Image.Image:
    """Decode an image to RGB; arguments and errors are those of `read_converted`."""
    return read_converted(file, name, max_pixels, background).image


def read_converted(file: Path | io.BytesIO, name: str, max_pixels: int, background: Background = "white") -> Converted:
    """Decode an image to RGB; all parts of the program use this function.

    Args:
        file: A file or its bytes.
        name: The image's name, for messages.
        max_pixels: Most pixels it may have; checked before decoding.
        background: See `to_rgb`.

    Returns:
        An RGB image, fully decoded, and notes on how it was converted.

    Raises:
        BadImageError: If it is not a complete image of at most `max_pixels` in a supported format.
    """
    try:
        with Image.open(file) as image:
            if image.format not in _FORMATS:
                raise BadImageError(f"image {name} is {image.format}, which is not supported; save it as PNG or JPEG")
            if image.width * image.height > max_pixels:
                raise BadImageError(
                    f"image {name} has {image.width} x {image.height} pixels, over max_image_pixels {max_pixels}",
                    "oversized image",
                )
            return to_rgb(image, background)
    except FileNotFoundError:
        raise BadImageError(f"image {name} is missing", "missing image") from None
    except _TOO_LARGE as error:  # Pillow has a limit of its own, and names the pixels
        found, own = re.search(r"\d+", str(error)), 2 * (Image.MAX_IMAGE_PIXELS or max_pixels)
        limit = f"max_image_pixels {max_pixels}" if max_pixels <= own else f"Pillow's limit of {own}"
        pixels = f"image {name} has {found[0] if found else 'more'} pixels, over {limit}"
        raise BadImageError(f"{pixels}; scale it down", "oversized image") from None
    except UnidentifiedImageError:
        raise BadImageError(f"image {name} cannot be read: it is not an image, or of an unknown format") from None
    except BadImageError:
        raise
    except Exception as error:  # Pillow's decoders raise anything for damaged files
        raise BadImageError(f"image {name} cannot be read: {error}") from None


class _OutsideError(BadImageError):
    """A name that leads out of the folder by itself, without a link."""


class FolderImages:
    """Images under one folder.

    Args:
        root: The folder; no file outside it is opened, by `..`, an absolute name or a link.
        max_pixels: Most pixels of an image.
        background: See `to_rgb`.
        follow_links: Whether links in the folder may lead out of it.
        match_names: Whether to match inexact names to files; see `NameIndex`.
        has_key: Whether a recipe opens the folder, so that messages may name its key `data.follow_links`.
    """

    def __init__(
        self,
        root: Path,
        max_pixels: int,
        *,
        background: Background = "white",
        follow_links: bool = False,
        match_names: bool = True,
        has_key: bool = True,
    ) -> None:
        self.root = root.resolve()
        self.max_pixels = max_pixels
        self.background: Background = background
        self.follow_links = follow_links
        self.has_key = has_key
        self._index = NameIndex(self.root, follow_links) if match_names else None

    def open(self, name: str) -> Image.Image:
        path = self.find(name)
        if not path.exists():
            raise self._missing(name)
        self._check_file(path, name)
        try:
            content = retry(path.read_bytes)
        except FileNotFoundError:
            raise self._missing(name) from None
        except OSError as error:
            raise BadImageError(f"image {name} cannot be read: {error.strerror}") from None
        return read_rgb(io.BytesIO(content), name, self.max_pixels, self.background)

    def read(self, name: str) -> bytes:
        try:
            path = self.find(name)
            self._check_file(path, name)
            return retry(path.read_bytes)
        except FileNotFoundError:
            raise self._missing(name) from None
        except OSError as error:
            raise BadImageError(f"image {name} cannot be read: {error.strerror}") from None

    def find(self, name: str) -> Path:
        """Return the path of an image: by its name, by its name in another release of COCO, or by `matched`.

        Raises:
            BadImageError: If the name is a URL, leads out of the folder, or matches several files.
        """
        return self._locate(name)[0]

    def matched(self, name: str) -> str | None:
        """Return the file, relative to the folder, to which a name was matched; None for an exact name.

        Raises:
            BadImageError: See `find`.
        """
        return self._locate(name)[1]

    def label(self, name: str) -> str:
        try:
            return self.matched(name) or name
        except BadImageError:
            return name

    def _locate(self, name: str) -> tuple[Path, str | None]:
        outside: BadImageError | None = None
        path = self.root
        try:
            path = self._inside(name)
            if path.exists():
                return path, None
        except _OutsideError as error:
            outside = error
        for candidate in coco_names(name) if outside is None else ():
            try:
                found = self._inside(candidate)
            except BadImageError:  # the COCO folder leads out of the root
                continue
            if found.exists():
                return found, None
        files = self._index.candidates(name) if self._index is not None else []
        if len(files) > 1:
            more = f" or {len(files) - 2:,} more" if len(files) > 2 else ""
            raise BadImageError(
                f"image {name} may be {files[0]} or {files[1]}{more}; write the exact file name", "ambiguous name"
            )
        if files:
            return self._inside(files[0]), files[0]
        if outside is not None:
            raise outside
        return path, None

    def _check_file(self, path: Path, name: str) -> None:
        """Refuse pipes and devices, which may block, and files too large for their pixels."""
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode) and not stat.S_ISDIR(facts.st_mode):
            raise BadImageError(f"image {name} is a pipe, socket or device, not a file")
        if facts.st_size > _HEAD_BYTES + _PIXEL_BYTES * self.max_pixels:
            raise BadImageError(
                f"image {name} is a file of {facts.st_size:,} bytes, too large for max_image_pixels {self.max_pixels}",
                "oversized image",
            )

    def _missing(self, name: str) -> BadImageError:
        return BadImageError(f"image {name} is missing", "missing image")

    def _inside(self, name: str) -> Path:
        """Return the path of a name with links resolved."""
        if "://" in name or name[:5].lower() == "data:":
            raise BadImageError(
                f"image {name:.60} is a URL; only files under {self.root} are opened", "outside the folder"
            )
        written = Path(os.path.normpath(self.root / name))
        try:
            path = (written if self.follow_links else self.root / name).resolve()
            path.exists()
        except (
            ValueError,
            RuntimeError,
            OSError,
        ) as error:  # a NUL in the name, a cyclic link, or a name that is too long
            raise BadImageError(f"image {name!r:.60} cannot be a file: {error!s:.100}", "missing image") from None
        if path.is_relative_to(self.root):
            return path
        if not written.is_relative_to(self.root):
            raise _OutsideError(f"image {name} is outside {self.root}", "outside the folder")
        if self.follow_links:
            return path
        hint = "; set data.follow_links=true to allow such links" if self.has_key else ""
        raise BadImageError(
            f"image {name} is outside {self.root}: {self._link(written)} is a link that leads out of it{hint}",
            "outside the folder",
        )

    def _link(self, written: Path) -> str:
        """Return the first part of a path that is a link out of the folder, relative to the folder."""
        steps = [*reversed(written.relative_to(self.root).parents), written.relative_to(self.root)]
        outside = (step for step in steps if not (self.root / step).resolve().is_relative_to(self.root))
        return next(outside, steps[-1]).as_posix()


class TableImages:
    """Images in a column of a `datasets.Dataset`, named by their row.

    Args:
        table: A data set whose column holds `{"bytes", "path"}` or None, undecoded.
        max_pixels: Most pixels of an image.
        column: The column's name; it may also hold lists of images.
        fingerprint: Hash of the table's content; "" if unknown.
        background: See `to_rgb`.
    """

    def __init__(
        self,
        table: Any,
        max_pixels: int,
        column: str = "image",
        fingerprint: str = "",
        background: Background = "white",
    ) -> None:
        self.background: Background = background
        self.fingerprint = fingerprint
        self.table = table
        self.max_pixels = max_pixels
        self.column = column

    def open(self, name: str) -> Image.Image:
        return read_rgb(io.BytesIO(self.read(name)), self.label(name), self.max_pixels, self.background)

    def label(self, name: str) -> str:
        content = self._cell(name)
        path = content.get("path") if isinstance(content, dict) else None
        return f"{path} of row {name}" if path else f"of row {name}"

    def _cell(self, name: str) -> Any:
        row, _, place = name.partition(":")
        content = self.table[int(row)][self.column]
        return content[int(place or 0)] if isinstance(content, list) else content

    def read(self, name: str) -> bytes:
        content = self._cell(name)
        if isinstance(content, (bytes, bytearray)):
            return bytes(content)
        if content and content.get("path") and not content.get("bytes"):
            raise BadImageError(
                f"image of row {name} is not in the table, only its path {content['path']}; set data.image_folder to "
                "the root of the images",
                "missing image",
            )
        if not content or not content.get("bytes"):
            raise BadImageError(f"image of row {name} is missing", "missing image")
        return bytes(content["bytes"])


class JoinedImages:
    """Images of several sources.

    Args:
        sources: The image sources.
    """

    def __init__(self, sources: Sequence[ImageSource]) -> None:
        self.sources = tuple(sources)

    def open(self, name: ImageId) -> Image.Image:
        return self.sources[name.source].open(name.name)

    def read(self, name: ImageId) -> bytes:
        return self.sources[name.source].read(name.name)

    def label(self, name: ImageId) -> str:
        return self.sources[name.source].label(name.name)


def join_images(sources: Sequence[ImageSource]) -> SplitImages:
    """Return the images of a split: of its one source, or of several by `ImageId`."""
    return sources[0] if len(sources) == 1 else JoinedImages(sources)
