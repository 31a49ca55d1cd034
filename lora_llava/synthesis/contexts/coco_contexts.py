"""Readers of COCO's annotation files, streamed because the instances of 2017 are 448 MB."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from struct import Struct
from typing import Any

from lora_llava.core.errors import UserError
from lora_llava.core.progress import progress_bar
from lora_llava.data.files.json_stream import JsonStream, NotFiniteError, array_items, first_line, is_cut
from lora_llava.data.files.row_files import DataFileError
from lora_llava.synthesis.contexts.context_builder import LARGEST, ContextBuilder, box_numbers, corners_of, scale

_BOX = Struct("<I4d")
"""Index of the label, and x, y, width, height in pixels."""
_BAD_VALUE = "a value is not a number, text, list or object"
"""Problem of a value that is not JSON, such as a word or NaN."""
_STUFF = {"furniture-stuff", "food-stuff", "raw-material"}
"""Supercategories that occur only in COCO stuff (arXiv 1612.03716), which annotates regions such as walls."""


@contextmanager
def open_json(file: Path, errors: str = "strict") -> Iterator[JsonStream]:
    """Open a JSON file and turn the errors of reading it into errors for the user.

    Args:
        file: JSON file in UTF-8.
        errors: Handling of bytes that are not UTF-8, as in `open`.

    Yields:
        The reader, after any byte order mark.

    Raises:
        DataFileError: If the file is not valid JSON in UTF-8.
    """
    problem = ""
    try:
        with file.open(encoding="utf-8-sig", errors=errors) as stream:
            yield JsonStream(stream, strict=True)
    except UnicodeDecodeError:
        problem = "not UTF-8; save it as UTF-8"
    except UnicodeEncodeError:
        problem = "it contains text that is not Unicode; save it as UTF-8"
    except RecursionError:
        problem = "not readable as JSON: it is nested too deeply"
    except json.JSONDecodeError as error:
        is_value = error.msg == "Expecting value"
        problem = f"not JSON: {_BAD_VALUE if is_value else first_line(error)}"
        if is_cut(error):
            problem = "not JSON: the file ends within a value; it seems truncated"
    except NotFiniteError:
        problem = f"not JSON: {_BAD_VALUE}"
    except ValueError as error:
        problem = first_line(error)
    if problem:
        raise DataFileError(f"{file}: {problem}")


def json_items(file: Path, key: str, to_end: bool = True) -> Iterator[Any]:
    """Stream the items of a list in a JSON file.

    Args:
        file: JSON file.
        key: Key of the list in the outer object, such as `annotations`.
        to_end: Whether to check the rest of the file after the list, too.

    Yields:
        Items, with numbers as int and float.

    Raises:
        DataFileError: If the file is not valid JSON.
    """
    with open_json(file) as reader:
        yield from array_items(reader, key, to_end)


def add_coco_captions(file: Path, builder: ContextBuilder) -> None:
    """Read captions in the form of `captions_train2017.json`.

    Args:
        file: `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`, in any order.
        builder: Builder that receives the captions.

    Raises:
        UserError: If an entry lacks a value or has one of the wrong type.
    """
    names = {key: builder.add_image(_get(entry, "file_name", where), where) for key, entry, where in _images(file)}
    for annotation, where in _annotations(file):
        key, caption = _get(annotation, "image_id", where), _get(annotation, "caption", where)
        if key not in names:
            builder.report.unlisted_annotations += 1
        elif not isinstance(caption, str):
            raise UserError(f"{where}: caption is {caption!r:.60}; it must be text")
        else:
            builder.add_captions(names[key], [caption])


def add_coco_instances(file: Path, builder: ContextBuilder) -> None:
    """Read boxes in the form of `instances_train2017.json`.

    Args:
        file: `{"images": [{"id", "file_name", "width", "height"}], "categories": [{"id", "name"}], "annotations":
            [{"image_id", "category_id", "bbox": [x, y, width, height], "iscrowd"}]}`, in any order, in pixels.
        builder: Builder that receives the boxes as fractions of the image's size, rounded to three decimals. Crowd
            regions are counted and dropped.

    Raises:
        UserError: If an entry lacks a value or has one of the wrong type.
    """
    images = {
        key: (builder.add_image(_get(entry, "file_name", where), where), entry.get("width"), entry.get("height"))
        for key, entry, where in _images(file)
    }
    labels = _categories(file)
    places = {key: place for place, key in enumerate(labels)}
    # Annotations come in any order, so boxes are kept in 36 bytes each until all are read.
    found: dict[Any, bytearray] = {}
    for annotation, where in _annotations(file):
        key, category = _get(annotation, "image_id", where), _get(annotation, "category_id", where)
        if key not in images:
            builder.report.unlisted_annotations += 1
        elif annotation.get("iscrowd"):
            builder.report.crowd_regions += 1
        elif category not in places:
            raise UserError(f"{where}: category_id is {category!r:.40}, which is not among the file's categories")
        else:
            numbers = box_numbers(annotation.get("bbox"), where)
            found.setdefault(key, bytearray()).extend(_BOX.pack(places[category], *numbers))
    names = list(labels.values())
    for key in list(found):
        name, width, height = images[key]
        where = f"{file}, image {key}"
        size = image_size(width, height, where)
        boxes = [
            (names[place], scale(corners_of(box, sized=True), *size))
            for place, *box in _BOX.iter_unpack(found.pop(key))
        ]
        builder.add_boxes(name, boxes, where, rounded=True)


def image_size(width: Any, height: Any, where: str) -> tuple[float, float]:
    """Check an image's width and height in pixels, and return them.

    Raises:
        UserError: If either is missing or not a positive number.
    """
    for name, value in (("width", width), ("height", height)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= LARGEST:
            raise UserError(
                f"{where}: {name} is {value!r:.40}; give the image's {name} in pixels, which boxes in pixels need"
            )
    return width, height


def _images(file: Path) -> Iterator[tuple[Any, dict[str, Any], str]]:
    """Yield the images that a file lists: id, entry, and position for messages."""
    for number, entry in enumerate(json_items(file, "images", to_end=False), 1):
        where = f"{file}, images, entry {number}"
        yield _get(entry, "id", where), entry, where


def _categories(file: Path) -> dict[Any, str]:
    """Return the names of the categories by id."""
    labels = {}
    for number, entry in enumerate(json_items(file, "categories", to_end=False), 1):
        where = f"{file}, categories, entry {number}"
        labels[_get(entry, "id", where)] = str(_get(entry, "name", where))
        if entry.get("supercategory") in _STUFF:
            raise UserError(
                f"{file}: it contains COCO stuff, which are regions such as sky; give instances_train2017.json"
            )
    return labels


def _annotations(file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the annotations of a file, each with its position for messages; the complete file is checked."""
    items = json_items(file, "annotations")
    for number, entry in enumerate(progress_bar(items, desc=file.name, unit=" annotations", leave=False, delay=1), 1):
        yield entry, f"{file}, annotations, entry {number}"


def _get(entry: Any, key: str, where: str) -> Any:
    """Return the number or text under a key of an entry."""
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, (str, int, float)):
        raise UserError(f"{where}: {key} is {value!r:.60}; every entry of a COCO file needs it")
    return value
