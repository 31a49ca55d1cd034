"""Readers of contexts other than COCO's files: LLaVA's rows, tables of captions, and boxes by image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lora_llava.core.errors import UserError
from lora_llava.core.progress import progress_bar
from lora_llava.data.files.json_stream import object_entries
from lora_llava.data.files.row_files import iterate_rows
from lora_llava.data.formats import Columns
from lora_llava.synthesis.contexts.coco_contexts import image_size, open_json
from lora_llava.synthesis.contexts.context_builder import ContextBuilder, Corners, box_numbers, corners_of, scale

BoxFormat = Literal["xyxy", "xywh"]
BoxUnit = Literal["fraction", "pixel"]
_LEAST, _MOST = -1.0, 2.0
"""Bounds of plausible fractions: a corner beyond them lies more than an image's size outside the image."""


@dataclass(frozen=True)
class BoxForm:
    """Meaning of the four numbers of a box, for entries that do not specify it themselves.

    Attributes:
        format: `xyxy`, two corners; `xywh`, one corner, width and height.
        unit: `fraction` of the image's width and height, or `pixel`.
    """

    format: BoxFormat = "xyxy"
    unit: BoxUnit = "fraction"


LLAVA = BoxForm()


def add_caption_rows(file: Path, builder: ContextBuilder, columns: Columns) -> None:
    """Read a table of captions, in which an image may have several rows.

    Args:
        file: Rows of an image name and a caption or a list of captions.
        builder: Builder that receives the captions.
        columns: Names of the columns.

    Raises:
        UserError: If a row lacks an image name or a caption.
    """
    for row, where in _rows(file):
        if columns.caption not in row:
            raise UserError(f"{where}: the column {columns.caption} is missing; it has {', '.join(map(str, row))}")
        name = builder.add_image(_image(row, columns), where)
        builder.add_captions(name, _texts(row[columns.caption], columns.caption, where))


def add_context_rows(file: Path, builder: ContextBuilder, columns: Columns) -> None:
    """Read LLaVA's rows of captions and boxes.

    Args:
        file: Rows `{"image", "captions": [...], "instances": [{"category", "bbox": [x1, y1, x2, y2]}]}`, corners as
            fractions; either list may be missing.
        builder: Builder that receives captions and boxes as they are.
        columns: Names of the columns.

    Raises:
        UserError: If a row has another form.
    """
    for row, where in _rows(file):
        if "captions" not in row and "instances" not in row:
            raise UserError(f"{where}: captions and instances are both missing; it has {', '.join(map(str, row))}")
        name = builder.add_image(_image(row, columns), where)
        builder.add_captions(name, _texts(row.get("captions", []), "captions", where))
        builder.add_boxes(name, _boxes(row, "instances", LLAVA, where), where, rounded=False)


def add_box_rows(file: Path, builder: ContextBuilder, columns: Columns, form: BoxForm) -> None:
    """Read rows of an image name and its boxes; see `add_box_entries`."""
    for row, where in _rows(file):
        _add_entry(row, builder.add_image(_image(row, columns), where), builder, form, where)


def add_box_entries(file: Path, builder: ContextBuilder, form: BoxForm) -> None:
    """Read boxes by image.

    Args:
        file: `{"1.jpg": {"width": 640, "height": 480, "boxes": [{"label": "dog", "bbox": [...]}]}}`, where `category`
            may replace `label`. Only pixels need width and height. An entry may set its own `box_format` and
            `box_unit`.
        builder: Builder that receives the boxes; pixels are converted to fractions of three decimals.
        form: Meaning of the numbers in entries that do not specify it.

    Raises:
        UserError: If an entry has another form, or its numbers contradict their format or unit.
    """
    entries = progress_bar(_entries(file), desc=file.name, unit=" images", leave=False, delay=1)
    for name, entry in entries:
        where = f"{file}, {name:.80}"
        if not isinstance(entry, Mapping):
            raise UserError(f"{where}: it is {entry!r:.60}; it must be an object with a list of boxes")
        _add_entry(entry, builder.add_image(name, where), builder, form, where)


def _entries(file: Path) -> Iterator[tuple[str, Any]]:
    with open_json(file) as reader:
        yield from object_entries(reader)


def _add_entry(entry: Mapping[str, Any], name: str, builder: ContextBuilder, form: BoxForm, where: str) -> None:
    """Add the boxes of one image, in the format and unit that the entry or else the file specifies."""
    if "boxes" not in entry:
        raise UserError(f"{where}: boxes is missing; it has {', '.join(map(str, entry)) or 'nothing'}")
    form = BoxForm(
        _check_choice(entry.get("box_format", form.format), "box_format", BoxFormat, where),
        _check_choice(entry.get("box_unit", form.unit), "box_unit", BoxUnit, where),
    )
    builder.add_boxes(name, _boxes(entry, "boxes", form, where), where, rounded=form.unit == "pixel")


def _check_choice(value: Any, key: str, choices: Any, where: str) -> Any:
    if value not in get_args(choices):
        raise UserError(f"{where}: {key} is {value!r:.40}; set it to {' or '.join(get_args(choices))}, or leave it out")
    return value


def _boxes(entry: Mapping[str, Any], key: str, form: BoxForm, where: str) -> list[tuple[str, Corners]]:
    """Return the boxes of a row or entry, with corners as fractions."""
    given = entry.get(key)
    if given is None:
        return []
    if not isinstance(given, (list, tuple)):
        raise UserError(f"{where}: {key} is {given!r:.60}; it must be a list")
    boxes = []
    for number, box in enumerate(given, 1):
        here = f"{where}, box {number}"
        label = box.get("label", box.get("category")) if isinstance(box, Mapping) else None
        if not isinstance(label, str):
            raise UserError(f"{here}: it is {box!r:.80}; it must have a label or category, and a bbox")
        boxes.append((label, _fractions(box_numbers(box.get("bbox"), here), form, entry, here)))
    return boxes


def _fractions(numbers: Corners, form: BoxForm, entry: Mapping[str, Any], where: str) -> Corners:
    """Convert a box to two corners in fractions, and check that its numbers agree with its format and unit."""
    problem = ""
    x1, y1, x2, y2 = corners = corners_of(numbers, sized=form.format == "xywh")
    if x2 < x1 or y2 < y1:
        why = "its second corner comes before its first" if form.format == "xyxy" else "a width or height is below 0"
        problem = f"{form.format}: {why}"
    elif form.unit == "pixel":
        width, height = image_size(entry.get("width"), entry.get("height"), where)
        corners = scale(corners, width, height)
        if max(map(abs, numbers)) <= 1 and any(x != int(x) for x in numbers):
            problem = "pixels: no number is over 1; if they are fractions, set box_unit to fraction"
        elif min(corners) < _LEAST or max(corners) > _MOST:
            problem = f"pixels of an image of {width} x {height}: it lies far outside the image"
    elif min(corners) < _LEAST or max(corners) > _MOST:
        largest = max(corners, key=abs)
        problem = f"fractions of an image: a corner is {largest:g}; give pixels as boxes with box_unit pixel"
    if problem:
        raise UserError(f"{where}: bbox {list(numbers)} is not in {problem}")
    return corners


def _rows(file: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yield the rows of a table, each with its position for messages."""
    rows: Iterable[Any] = progress_bar(iterate_rows(file), desc=file.name, unit=" rows", leave=False, delay=1)
    for number, row in enumerate(rows, 1):
        where = f"{file}, row {number}"
        if not isinstance(row, Mapping):
            raise UserError(f"{where}: it is {row!r:.60}; it must be an object with named fields")
        yield row, where


def _image(row: Mapping[str, Any], columns: Columns) -> Any:
    """Return the image's name, or the path of an image that is stored in the table."""
    value = row.get(columns.image)
    return value.get("path") if isinstance(value, Mapping) else value


def _texts(value: Any, column: str, where: str) -> list[str]:
    """Return one or several captions as a list; a missing value becomes an empty caption, which is counted."""
    if value is None or value != value:  # NaN is not itself
        return [""]
    if isinstance(value, (list, tuple)):
        return [text for each in value for text in _texts(each, column, where)]
    if isinstance(value, (str, int, float)):
        return [str(value)]
    raise UserError(f"{where}: {column} is {value!r:.60}; it must be text, or a list of texts")
