"""Contexts that are not COCO's files: LLaVA's rows, tables of captions, and boxes by image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import ijson  # type: ignore[import-untyped]
from tqdm import tqdm

from lora_llava.core.errors import UserError
from lora_llava.data.files.reading import iterate_rows
from lora_llava.data.formats import Columns
from lora_llava.synthesis.contexts.coco_contexts import image_size, open_json
from lora_llava.synthesis.contexts.context_builder import ContextBuilder, Corners, box_numbers, corners_of, scale

BoxFormat = Literal["xyxy", "xywh"]
BoxUnit = Literal["fraction", "pixel"]
_LEAST, _MOST = -1.0, 2.0
"""Fractions beyond these lie more than a whole image outside it: they are no fractions of that image."""


@dataclass(frozen=True)
class BoxForm:
    """What the four numbers of a file's boxes are, where its entries do not say so themselves.

    Attributes:
        format: `xyxy`, two corners; `xywh`, one corner, width and height.
        unit: `fraction` of the image's width and height, or `pixel`.
    """

    format: BoxFormat = "xyxy"
    unit: BoxUnit = "fraction"


LLAVA = BoxForm()


def add_caption_rows(file: Path, builder: ContextBuilder, columns: Columns) -> None:
    """Read a table of captions; several rows with one image each add to its captions.

    Args:
        file: Rows of an image's name and a caption, or a list of captions.
        builder: Takes them.
        columns: What they are called.

    Raises:
        UserError: For a row that lacks either.
    """
    for row, where in _rows(file):
        if columns.caption not in row:
            raise UserError(f"{where}: no column {columns.caption}; it has {', '.join(map(str, row))}")
        name = builder.add_image(_image(row, columns), where)
        builder.add_captions(name, _texts(row[columns.caption], columns.caption, where))


def add_context_rows(file: Path, builder: ContextBuilder, columns: Columns) -> None:
    """Read LLaVA's rows of captions and boxes.

    Args:
        file: Rows `{"image", "captions": [...], "instances": [{"category", "bbox": [x1, y1, x2, y2]}]}`, corners as
            fractions; either list may be missing.
        builder: Takes them as they are.
        columns: What the image's name is called.

    Raises:
        UserError: For a row that is not so.
    """
    for row, where in _rows(file):
        if "captions" not in row and "instances" not in row:
            raise UserError(f"{where}: neither captions nor instances; it has {', '.join(map(str, row))}")
        name = builder.add_image(_image(row, columns), where)
        builder.add_captions(name, _texts(row.get("captions", []), "captions", where))
        builder.add_boxes(name, _boxes(row, "instances", LLAVA, where), where, rounded=False)


def add_box_rows(file: Path, builder: ContextBuilder, columns: Columns, form: BoxForm) -> None:
    """Read rows of an image's name and its boxes; see `add_box_entries`."""
    for row, where in _rows(file):
        _add_entry(row, builder.add_image(_image(row, columns), where), builder, form, where)


def add_box_entries(file: Path, builder: ContextBuilder, form: BoxForm) -> None:
    """Read boxes by image.

    Args:
        file: `{"1.jpg": {"width": 640, "height": 480, "boxes": [{"label": "dog", "bbox": [...]}]}}`; `category` does
            as well as `label`. Width and height are needed with pixels alone. An entry may say `box_format` and
            `box_unit` for itself.
        builder: Takes them; those in pixels rounded to three decimals.
        form: What the numbers are where the entry does not say.

    Raises:
        UserError: For an entry that is not so, does not say what its numbers are, or whose numbers cannot be that.
    """
    with open_json(file) as stream:
        entries = ijson.kvitems(stream, "", use_float=True)
        for name, entry in tqdm(entries, desc=file.name, unit=" images", leave=False, delay=1, dynamic_ncols=True):
            where = f"{file}, {name:.80}"
            if not isinstance(entry, Mapping):
                raise UserError(f"{where}: it is {entry!r:.60}; it should be an object with a list of boxes")
            _add_entry(entry, builder.add_image(name, where), builder, form, where)


def _add_entry(entry: Mapping[str, Any], name: str, builder: ContextBuilder, form: BoxForm, where: str) -> None:
    if "boxes" not in entry:
        raise UserError(f"{where}: no boxes; it has {', '.join(map(str, entry)) or 'nothing'}")
    form = BoxForm(
        _said(entry.get("box_format", form.format), "box_format", BoxFormat, where),
        _said(entry.get("box_unit", form.unit), "box_unit", BoxUnit, where),
    )
    builder.add_boxes(name, _boxes(entry, "boxes", form, where), where, rounded=form.unit == "pixel")


def _said(value: Any, key: str, choices: Any, where: str) -> Any:
    if value not in get_args(choices):
        raise UserError(f"{where}: {key} is {value!r:.40}; say {' or '.join(get_args(choices))}, or leave it out")
    return value


def _boxes(entry: Mapping[str, Any], key: str, form: BoxForm, where: str) -> list[tuple[str, Corners]]:
    """The boxes of a row or entry, in fractions."""
    given = entry.get(key)
    if given is None:
        return []
    if not isinstance(given, (list, tuple)):
        raise UserError(f"{where}: {key} is {given!r:.60}; it should be a list")
    boxes = []
    for number, box in enumerate(given, 1):
        here = f"{where}, box {number}"
        label = box.get("label", box.get("category")) if isinstance(box, Mapping) else None
        if not isinstance(label, str):
            raise UserError(f"{here}: it is {box!r:.80}; it should have a label, or category, and a bbox")
        boxes.append((label, _fractions(box_numbers(box.get("bbox"), here), form, entry, here)))
    return boxes


def _fractions(numbers: Corners, form: BoxForm, entry: Mapping[str, Any], where: str) -> Corners:
    """Two corners in fractions of the image's size, held to be what they are said to be."""
    problem = ""
    x1, y1, x2, y2 = corners = corners_of(numbers, sized=form.format == "xywh")
    if x2 < x1 or y2 < y1:
        why = "its second corner comes before its first" if form.format == "xyxy" else "a width or height is below 0"
        problem = f"{form.format}: {why}"
    elif form.unit == "pixel":
        width, height = image_size(entry.get("width"), entry.get("height"), where)
        corners = scale(corners, width, height)
        if max(map(abs, numbers)) <= 1 and any(x != int(x) for x in numbers):
            problem = "pixels: no number is over 1; are they fractions?"
        elif min(corners) < _LEAST or max(corners) > _MOST:
            problem = f"pixels of an image of {width} x {height}: it lies more than a whole image outside"
    elif min(corners) < _LEAST or max(corners) > _MOST:
        problem = f"fractions of an image: a corner is {max(corners, key=abs):g}; are they pixels?"
    if problem:
        raise UserError(f"{where}: bbox {list(numbers)} cannot be {problem}")
    return corners


def _rows(file: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    rows: Iterable[Any] = tqdm(
        iterate_rows(file), desc=file.name, unit=" rows", leave=False, delay=1, dynamic_ncols=True
    )
    for number, row in enumerate(rows, 1):
        where = f"{file}, row {number}"
        if not isinstance(row, Mapping):
            raise UserError(f"{where}: it is {row!r:.60}; it should be an object with named fields")
        yield row, where


def _image(row: Mapping[str, Any], columns: Columns) -> Any:
    """The image's name; of an image that is stored in the table, its path."""
    value = row.get(columns.image)
    return value.get("path") if isinstance(value, Mapping) else value


def _texts(value: Any, column: str, where: str) -> list[str]:
    """One caption or several; nothing is an empty one, which is counted."""
    if value is None or value != value:  # NaN is not itself
        return [""]
    if isinstance(value, (list, tuple)):
        return [text for each in value for text in _texts(each, column, where)]
    if isinstance(value, (str, int, float)):
        return [str(value)]
    raise UserError(f"{where}: {column} is {value!r:.60}; it should be text, or a list of texts")
