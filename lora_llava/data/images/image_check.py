"""Inspect images in parallel for errors and oddities; unchanged files are not opened again."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from lora_llava.core.storage import atomic_file
from lora_llava.data.files.row_files import Counted
from lora_llava.data.images.image_id import ImageName
from lora_llava.data.images.image_names import MATCHED, contradictions
from lora_llava.data.images.image_sources import (
    BadImageError,
    FolderImages,
    ImageSource,
    SplitImages,
    TableImages,
    read_converted,
)
from lora_llava.data.images.to_rgb import CONVERSION_RULE, TRANSPARENT, Background

_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "GIF": (".gif",),
    "WEBP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "MPO": (".jpg", ".jpeg", ".mpo"),
}
_ORIENTATION = 0x0112
"""The EXIF tag of the camera's orientation; 1 is upright (CIPA DC-008, section 4.6.4)."""
_AT_ONCE = 64
_FACTS = 3
"""Increase it when facts are added: cached facts without them are collected again."""
_BLOCK = 1 << 20
"""Pixels that are hashed at a time."""
_TINY = 8
"""Images with a side of fewer pixels are reported as tiny."""


@dataclass(frozen=True)
class ImageFacts:
    """Facts about an image.

    Attributes:
        problem: Why it cannot be used; None if it can.
        kind: The problem in a word or two.
        oddities: Warnings about a usable image: pairs of kind and message.
        digest: SHA-256 of its file, in hex; "" if none exists.
        pixels: Hash of its pixels, 16 hex digits, the same for lossless copies in any format; "" if it cannot be used.
        size: Its height and width in pixels; (0, 0) if it cannot be used.
    """

    problem: str | None = None
    kind: str = ""
    oddities: tuple[tuple[str, str], ...] = ()
    digest: str = ""
    pixels: str = field(default="", compare=False)
    size: tuple[int, int] = field(default=(0, 0), compare=False)


def inspect_images(
    images: ImageSource,
    names: Iterable[str],
    cache: Path | None = None,
    progress: Callable[[Iterable[ImageFacts]], Iterable[ImageFacts]] = lambda found: found,
) -> dict[str, ImageFacts]:
    """Inspect images, opening them as training does.

    Args:
        images: The image source, with a limit on pixels.
        names: The names of the images.
        cache: The file that caches the facts by name, size and time of change; None does not cache.
        progress: Wraps the inspected images, for a progress bar.

    Returns:
        The facts about the images, by name.
    """
    names = list(names)
    known = _load(cache)
    stamps = {name: _stamp(images, name) for name in names}
    found = {
        name: known[name][1] for name in names if name in known and stamps[name] and known[name][0] == stamps[name]
    }
    missing = [name for name in names if name not in found]
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        warnings.simplefilter("ignore")  # Pillow's warnings; `_oddities` finds what matters
        try:
            coming = Counted(_mapped(pool, images, missing), len(missing))
            for name, image in zip(missing, progress(coming), strict=True):
                found[name] = image
        finally:
            if missing:
                _save(cache, {**known, **{name: (stamps[name], p) for name, p in found.items() if stamps[name]}})
    found = {name: found[name] for name in names}
    return found | _contradicting(images, found)


def _contradicting(images: ImageSource, found: Mapping[str, ImageFacts]) -> dict[str, ImageFacts]:
    """Return errors for names matched to a file that another name also means: `a/01.png` and `b/01.png` differ."""
    matched: dict[str, str] = {}
    if isinstance(images, FolderImages):
        loose = (name for name, image in found.items() if any(kind == MATCHED for kind, _ in image.oddities))
        matched = {name: images.label(name) for name in loose}
    if not matched:
        return {}
    files: dict[str, str] = {}
    for name in found:
        with contextlib.suppress(BadImageError):
            files[name] = str(images.find(name))  # type: ignore[attr-defined]
    return {
        name: ImageFacts(
            f"image {name} may be {matched[name]}, but so may {other}; write the exact file names", "ambiguous name"
        )
        for name, other in contradictions(files, matched).items()
    }


def _mapped(pool: ThreadPoolExecutor, images: ImageSource, names: list[str]) -> Iterator[ImageFacts]:
    """Inspect a limited number of images at a time, so that memory does not grow with their number."""
    waiting = iter(names)
    running = [pool.submit(inspect_image, images, name) for name in islice(waiting, _AT_ONCE)]
    while running:
        yield running.pop(0).result()
        running += [pool.submit(inspect_image, images, name) for name in islice(waiting, 1)]


def inspect_image(images: ImageSource, name: str) -> ImageFacts:
    """Inspect one image, decoding it completely as training does."""
    limit: int = images.max_pixels  # type: ignore[attr-defined]
    digest = ""
    try:
        content = images.read(name)
        digest = hashlib.sha256(content).hexdigest()
        label = images.label(name)
        background: Background = images.background  # type: ignore[attr-defined]
        converted = read_converted(io.BytesIO(content), label, limit, background)
        notes = converted.notes
        oddities = [*_match(images, name), *((kind, f"image {label} {note}") for kind, note in notes)]
        if background != "white" and any(kind == TRANSPARENT for kind, _ in notes):  # the hash is the same for all
            converted = read_converted(io.BytesIO(content), label, limit)
        pixels = pixel_hash(converted.image)
        found = (*oddities, *_oddities(content, label, bool(notes)))
        return ImageFacts(None, "", found, digest, pixels, (converted.image.height, converted.image.width))
    except BadImageError as error:
        return ImageFacts(str(error), error.kind, (), digest)


def image_size(images: SplitImages, name: ImageName) -> tuple[int, int]:
    """Return the height and width of an image, read from the head of its file; (0, 0) if it cannot be read."""
    try:
        with Image.open(io.BytesIO(images.read(name))) as image:
            return image.height, image.width
    except Exception:  # Pillow's decoders raise anything for damaged files
        return 0, 0


def pixel_hash(image: Image.Image) -> str:
    """Return a hash of an RGB image's size and pixels, 16 hex digits."""
    digest = hashlib.sha256(f"{image.width} x {image.height} ".encode())
    rows = max(1, _BLOCK // max(1, image.width))
    for top in range(0, image.height, rows):  # in parts, so that a large image is not in memory twice
        digest.update(image.crop((0, top, image.width, min(top + rows, image.height))).tobytes())
    return digest.hexdigest()[:16]


def _match(images: ImageSource, name: str) -> Iterator[tuple[str, str]]:
    file = images.matched(name) if isinstance(images, FolderImages) else None
    if file is not None:
        yield MATCHED, f"image {name} does not exist under this name; the file {file} is used"


def _oddities(content: bytes, name: str, is_converted: bool) -> list[tuple[str, str]]:
    """Return the oddities of a usable image; a failure to read its details is one more."""
    found: list[tuple[str, str]] = []
    try:
        found.extend(_find_oddities(content, name, is_converted))
    except Exception as error:  # Pillow's decoders raise anything for the data after the first frame
        found.append(("odd image", f"image {name} is read, but a part of its file is damaged: {error}"))
    return found


def _find_oddities(content: bytes, name: str, is_converted: bool) -> Iterator[tuple[str, str]]:
    with Image.open(io.BytesIO(content)) as image:
        kind, suffix = str(image.format), Path(name).suffix.lower()
        known = {other for suffixes in _SUFFIXES.values() for other in suffixes}
        if suffix in known and suffix not in _SUFFIXES.get(kind, ()):
            yield "mislabelled image", f"image {name} is a {kind}; it is read as such, but its suffix is wrong"
        if image.mode != "RGB" and not is_converted:
            yield "image not RGB", f"image {name} has mode {image.mode}; it is converted, check it in the preview"
        if getattr(image, "n_frames", 1) > 1:
            yield "several frames", f"image {name} has {image.n_frames} frames; only the first is used"  # type: ignore[attr-defined]
        if image.getexif().get(_ORIENTATION, 1) not in (0, 1):
            yield (
                "turned image",
                f"image {name} is rotated by an EXIF tag, which is ignored; the model sees it unrotated",
            )
        if min(image.size) < _TINY:
            yield "tiny image", f"image {name} has {image.width} x {image.height} pixels"


def _stamp(images: ImageSource, name: str) -> str:
    """Return the size, the times and the settings of an image as a cache key; empty if it is not a file."""
    if isinstance(images, TableImages) and images.fingerprint:
        return f"{images.fingerprint}:{images.max_pixels}:{images.background}:{CONVERSION_RULE}:{_FACTS}"
    if not isinstance(images, FolderImages):
        return ""
    try:
        path = images.find(name)
        facts = path.stat()
    except (BadImageError, OSError):
        return ""
    # st_ctime_ns too: a copy that keeps the time of change (`cp -p`, rsync) may also have the same size.
    times = f"{facts.st_mtime_ns}:{facts.st_ctime_ns}"
    return f"{path}:{facts.st_size}:{times}:{images.max_pixels}:{images.background}:{CONVERSION_RULE}:{_FACTS}"


def _load(cache: Path | None) -> dict[str, tuple[str, ImageFacts]]:
    if cache is None or not cache.is_file():
        return {}
    try:
        kept = json.loads(cache.read_text(encoding="utf-8"))
        return {name: (stamp, ImageFacts(**facts | _as_tuples(facts))) for name, (stamp, facts) in kept.items()}
    except (ValueError, TypeError, KeyError, AttributeError):  # incomplete, or of another version: inspect again
        return {}


def _as_tuples(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts that are tuples, which JSON writes as lists."""
    return {"oddities": tuple(map(tuple, facts["oddities"])), "size": tuple(facts.get("size", (0, 0)))}


def _save(cache: Path | None, found: dict[str, tuple[str, ImageFacts]]) -> None:
    if cache is None:
        return
    content = {name: (stamp, asdict(image)) for name, (stamp, image) in found.items()}
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(cache) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):  # an unwritable cache is not used
            raise
