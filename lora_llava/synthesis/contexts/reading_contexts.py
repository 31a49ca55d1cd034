"""Reader of contexts from COCO's files, LLaVA's rows, tables of captions or the user's own boxes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lora_llava.core.errors import UserError, nearest
from lora_llava.data.files.json_stream import JsonStream
from lora_llava.data.files.row_files import data_file, iterate_rows
from lora_llava.data.formats import CHAT_COLUMNS, Columns
from lora_llava.data.images.image_sources import BadImageError, FolderImages
from lora_llava.synthesis.contexts.coco_contexts import (
    add_coco_captions,
    add_coco_instances,
    json_items,
    open_json,
)
from lora_llava.synthesis.contexts.context import Box, Context
from lora_llava.synthesis.contexts.context_builder import BoxPolicy, ContextBuilder, ContextReport
from lora_llava.synthesis.contexts.row_contexts import (
    BoxForm,
    BoxFormat,
    BoxUnit,
    add_box_entries,
    add_box_rows,
    add_caption_rows,
    add_context_rows,
)

MissingPolicy = Literal["error", "drop"]
_WANTED = {
    "captions": "COCO captions (captions_train2017.json) or rows of image and caption",
    "instances": "COCO instances (instances_train2017.json)",
    "boxes": "boxes by image",
    "contexts": "rows of image, captions and instances",
}
_KINDS: dict[str, tuple[str, str | None]] = {
    "coco captions": ("COCO captions", "captions"),
    "coco instances": ("COCO instances", "instances"),
    "coco keypoints": ("COCO keypoints, which cover only people", None),
    "coco panoptic": ("COCO panoptic segments, which lack boxes of single objects", None),
    "coco results": ("COCO results of a detector or captioner, which do not name their images", None),
    "coco images": ("a COCO list of images without annotations", None),
    "coco annotations": ("annotations that are neither captions nor boxes", None),
    "caption rows": ("rows of image and caption", "captions"),
    "context rows": ("rows of image, captions and instances", "contexts"),
    "box rows": ("boxes by image", "boxes"),
    "box entries": ("boxes by image", "boxes"),
    "conversations": ("conversations, which are the output of this verb", None),
}
"""Kinds of files: the description in messages, and the argument that accepts the kind."""


class Contexts(Sequence[Context]):
    """Contexts sorted by image name, stored as bytes.

    Args:
        found: Captions and boxes by image, from `ContextBuilder.finish`.
        report: Counts of what was read and dropped.
    """

    def __init__(self, found: Mapping[str, bytes], report: ContextReport) -> None:
        self.images, self._found, self.report = list(found), list(found.values()), report

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Any:
        """Return one context, or a list of contexts for a slice."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        captions, boxes = json.loads(self._found[index])
        return Context(
            self.images[index], tuple(captions), tuple(Box(label, tuple(corners)) for label, *corners in boxes)
        )


def read_contexts(
    *,
    captions: Path | None = None,
    instances: Path | None = None,
    boxes: Path | None = None,
    contexts: Path | None = None,
    columns: Mapping[str, str] | None = None,
    box_format: BoxFormat = "xyxy",
    box_unit: BoxUnit = "fraction",
    on_bad_box: BoxPolicy = "clip",
    images: Path | None = None,
    missing_image: MissingPolicy = "error",
    where: str = "",
) -> Contexts:
    """Read captions and boxes and join them by image name.

    The kind of a file is detected from its contents. At least one file is needed; an image may have captions alone or
    boxes alone. Each caption becomes one line, and repeated captions of an image count once.

    Args:
        captions: COCO's captions, or a table (JSON, JSONL, CSV, TSV, Parquet) with one caption per row.
        instances: COCO's instances, in pixels.
        boxes: Your own boxes by image: `{"1.jpg": {"width": 640, "height": 480, "boxes": [{"label": "dog", "bbox":
            [...]}]}}`, or rows with the same keys and `image`.
        contexts: LLaVA's rows `{"image", "captions": [...], "instances": [{"category", "bbox": [x1, y1, x2, y2]}]}`,
            corners as fractions; numbers are kept as they are written.
        columns: Column names for `image` and `caption` in tables.
        box_format: Meaning of the four numbers in `boxes`: `xyxy`, two corners, or `xywh`, a corner and a size. An
            entry's own `box_format` or `box_unit` takes precedence.
        box_unit: `fraction` of the image's size, or `pixel`, which needs each image's width and height.
        on_bad_box: `clip` clips a box to the image, drops it if nothing is left, and counts it; `error` raises.
        images: Image folder; None skips the check for missing images.
        missing_image: Handling of an image that is not in the folder: `error` raises; `drop` drops its context and
            counts it.
        where: Prefix of the arguments' names in messages.

    Returns:
        The contexts, sorted by image name, with their `report`.

    Raises:
        UserError: If a file is missing, broken or of the wrong kind, a row is invalid, an image's name leads out of its
            folder, or no context is left.
    """
    prefix = f"{where}." if where else ""
    given = {"captions": captions, "instances": instances, "boxes": boxes, "contexts": contexts}
    names = _columns(columns or {}, f"{prefix}columns")
    is_there = _presence(images, missing_image, prefix)
    builder = ContextBuilder(on_bad_box)
    for field, path in given.items():
        if path is not None:
            file = data_file(path, prefix + field)
            kind = _file_kind(file, names, _WANTED[field], f"{prefix}columns")
            _check_kind(file, kind, field, prefix)
            _add(file, kind, builder, names, BoxForm(box_format, box_unit))
    if not any(given.values()):
        raise UserError(f"{', '.join(prefix + field for field in given)}: no file is given; set one of them")
    found = builder.finish(is_there)
    if not found:
        files = ", ".join(str(path) for path in given.values() if path)
        raise UserError(f"{files}: no image with a context is left ({builder.report}); check why they were dropped")
    return Contexts(found, builder.report)


def _columns(given: Mapping[str, str], field: str) -> Columns:
    known = ("image", "caption")
    for name in given:
        if name not in known:
            raise UserError(
                f"{field}: {name!r} is not a known column{nearest(name, known)}; map only image and caption"
            )
    return Columns(**given)


def _presence(images: Path | None, missing_image: MissingPolicy, prefix: str) -> Callable[[str], bool]:
    """Return a function that checks whether an image is in the folder."""
    if images is None:
        return lambda name: True
    if not images.is_dir():
        raise UserError(f"{prefix}images: the folder {images} does not exist; name the root folder of the images")
    folder = FolderImages(images, max_pixels=0, match_names=False, has_key=False)

    def is_there(name: str) -> bool:
        try:
            found = folder.find(name).is_file()
        except BadImageError as error:
            if error.kind == "outside the folder":  # through a link
                raise
            found = False
        if not found and missing_image == "error":
            raise UserError(
                f"{prefix}images: image {name} is not in {images}; add it, or set {prefix}missing_image to drop"
            )
        return found

    return is_there


def _add(file: Path, kind: str, builder: ContextBuilder, columns: Columns, form: BoxForm) -> None:
    readers: dict[str, Callable[[], None]] = {
        "coco captions": lambda: add_coco_captions(file, builder),
        "coco instances": lambda: add_coco_instances(file, builder),
        "caption rows": lambda: add_caption_rows(file, builder, columns),
        "context rows": lambda: add_context_rows(file, builder, columns),
        "box rows": lambda: add_box_rows(file, builder, columns, form),
        "box entries": lambda: add_box_entries(file, builder, form),
    }
    readers[kind]()


def _check_kind(file: Path, kind: str, field: str, prefix: str) -> None:
    """Check that an argument accepts the kind of its file."""
    description, right_field = _KINDS[kind]
    if right_field != field:
        fix = f"; give it as {prefix}{right_field}" if right_field else ""
        raise UserError(f"{prefix}{field}: {file} contains {description}; it must contain {_WANTED[field]}{fix}")


def _file_kind(file: Path, columns: Columns, wanted: str, field: str) -> str:
    """Detect the kind of a file from its first entries."""
    kind = _object_kind(file, columns, wanted) if file.suffix.lower() == ".json" else "rows"
    if kind == "rows":
        return _row_kind(file, columns, wanted, field)
    if kind != "coco":
        return kind
    annotation = next(json_items(file, "annotations"), None)
    if not isinstance(annotation, dict):
        return "coco images"
    for key, its in (
        ("caption", "captions"),
        ("segments_info", "panoptic"),
        ("keypoints", "keypoints"),
        ("bbox", "instances"),
    ):
        if key in annotation:
            return f"coco {its}"
    return "coco annotations"


def _object_kind(file: Path, columns: Columns, wanted: str) -> str:
    """Detect from its outer keys whether a JSON file is a COCO file, boxes by image, or rows: a list or many lines.

    Bytes that are not UTF-8 are ignored, because rows may have another encoding.
    """
    key = ""
    with open_json(file, errors="replace") as reader:
        if reader.peek() != "{":
            return "rows"
        for key in reader.members():
            opening = reader.peek()
            if opening == "[" and key in ("images", "annotations"):
                return "coco"
            if opening == '"' and key == columns.image:
                return "rows"
            if opening != "{":
                reader.skip()
            elif _has_boxes(reader):
                return "box entries"
        if reader.peek():  # JSON lines in a file named .json
            return "rows"
    raise UserError(f"{file}: it contains an object with {key!r:.40} and no boxes; it must contain {wanted}")


def _has_boxes(reader: JsonStream) -> bool:
    """Check whether the object that starts here has a list of boxes; if not, the reader is after it."""
    for key in reader.members():
        if key == "boxes" and reader.peek() == "[":
            return True
        reader.skip()
    return False


def _row_kind(file: Path, columns: Columns, wanted: str, field: str) -> str:
    """Detect the kind of a table from the columns of its first row."""
    row = next(iterate_rows(file), None)
    if not isinstance(row, Mapping):
        content = "no rows" if row is None else f"rows of type {type(row).__name__}"
        raise UserError(f"{file}: it contains {content}; it must contain {wanted}")
    if any(key in row for key in CHAT_COLUMNS):
        return "conversations"
    if "image_id" in row and columns.image not in row:
        return "coco results"
    if columns.image in row:
        for key, kind in (
            ("instances", "context"),
            ("boxes", "box"),
            (columns.caption, "caption"),
            ("captions", "context"),
        ):
            if key in row:
                return f"{kind} rows"
    found = ", ".join(map(str, row))
    raise UserError(f"{file}: its rows have the columns {found}; it must contain {wanted}; {field} renames columns")
