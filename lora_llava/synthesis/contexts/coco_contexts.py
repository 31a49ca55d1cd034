"""COCO's annotation files: captions and boxes by image, streamed, since the instances of 2017 are 448 MB."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from struct import Struct
from typing import IO, Any

import ijson  # type: ignore[import-untyped]
from tqdm import tqdm

from lora_llava.core.errors import UserError
from lora_llava.data.files.reading import DataFileError
from lora_llava.synthesis.contexts.context_builder import ContextBuilder, box_numbers, corners_of, scale

_BOX = Struct("<I4d")
"""Which label, and x, y, width, height in pixels."""
_STUFF = {"furniture-stuff", "food-stuff", "raw-material"}
"""Groups of categories that only COCO's stuff has (arXiv 1612.03716): regions such as walls, no objects."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@contextmanager
def open_json(file: Path) -> Iterator[IO[bytes]]:
    """Open a JSON file for ijson, whose errors are told.

    Args:
        file: In UTF-8.

    Yields:
        Its bytes after the byte order mark.

    Raises:
        DataFileError: For what is no JSON.
    """
    try:
        with file.open("rb") as stream:
            if stream.read(len(_BYTE_ORDER_MARK)) != _BYTE_ORDER_MARK:
                stream.seek(0)
            yield stream
    except UnicodeDecodeError:  # half a surrogate pair, which ijson makes bytes of that are no text
        raise DataFileError(f"{file}: a text in it is not Unicode; save it as UTF-8") from None
    except ijson.JSONError as error:
        problem = str(error)
        if "UTF8" in problem:
            raise DataFileError(f"{file}: not UTF-8; save it as UTF-8") from None
        if "premature EOF" in problem:
            raise DataFileError(f"{file}: not JSON: the file ends within a value: it is cut off") from None
        raise DataFileError(f"{file}: not JSON: {problem.splitlines()[0].removeprefix('parse error: ')}") from None


def json_items(file: Path, prefix: str) -> Iterator[Any]:
    """The items of a list in a JSON file, one at a time.

    Args:
        file: To read.
        prefix: Where they are, as ijson has it: `annotations.item`.

    Yields:
        Each, numbers as int and float.

    Raises:
        DataFileError: For what is no JSON.
    """
    with open_json(file) as stream:
        yield from ijson.items(stream, prefix, use_float=True)


def add_coco_captions(file: Path, builder: ContextBuilder) -> None:
    """Read captions as `captions_train2017.json` has them.

    Args:
        file: `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`, in any order.
        builder: Takes them.

    Raises:
        UserError: For an entry that lacks something, or is of the wrong kind.
    """
    names = {key: builder.add_image(_get(entry, "file_name", where), where) for key, entry, where in _images(file)}
    for annotation, where in _annotations(file):
        key, caption = _get(annotation, "image_id", where), _get(annotation, "caption", where)
        if key not in names:
            builder.report.unlisted_annotations += 1
        elif not isinstance(caption, str):
            raise UserError(f"{where}: caption is {caption!r:.60}; it should be text")
        else:
            builder.add_captions(names[key], [caption])


def add_coco_instances(file: Path, builder: ContextBuilder) -> None:
    """Read boxes as `instances_train2017.json` has them.

    Args:
        file: `{"images": [{"id", "file_name", "width", "height"}], "categories": [{"id", "name"}], "annotations":
            [{"image_id", "category_id", "bbox": [x, y, width, height], "iscrowd"}]}`, in any order, in pixels.
        builder: Takes them as fractions of the image's size, rounded to three decimals; crowd regions are counted
            and dropped.

    Raises:
        UserError: For an entry that lacks something, or is of the wrong kind.
    """
    images = {
        key: (builder.add_image(_get(entry, "file_name", where), where), entry.get("width"), entry.get("height"))
        for key, entry, where in _images(file)
    }
    labels = _categories(file)
    places = {key: place for place, key in enumerate(labels)}
    # Annotations come in any order: until all are read, a box is 36 bytes.
    found: dict[Any, bytearray] = {}
    for annotation, where in _annotations(file):
        key, category = _get(annotation, "image_id", where), _get(annotation, "category_id", where)
        if key not in images:
            builder.report.unlisted_annotations += 1
        elif annotation.get("iscrowd"):
            builder.report.crowd_regions += 1
        elif category not in places:
            raise UserError(f"{where}: category_id is {category!r:.40}, which the file's categories do not hold")
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
    """An image's width and height in pixels.

    Raises:
        UserError: Where they are not given, or cannot be.
    """
    for name, value in (("width", width), ("height", height)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise UserError(f"{where}: {name} is {value!r:.40}; boxes in pixels need the image's {name} in pixels")
    return width, height


def _images(file: Path) -> Iterator[tuple[Any, dict[str, Any], str]]:
    """The images that a file lists: id, entry, and where it is."""
    for number, entry in enumerate(json_items(file, "images.item"), 1):
        where = f"{file}, images, entry {number}"
        yield _get(entry, "id", where), entry, where


def _categories(file: Path) -> dict[Any, str]:
    """Names of categories by id."""
    labels = {}
    for number, entry in enumerate(json_items(file, "categories.item"), 1):
        where = f"{file}, categories, entry {number}"
        labels[_get(entry, "id", where)] = str(_get(entry, "name", where))
        if entry.get("supercategory") in _STUFF:
            raise UserError(
                f"{file}: it holds COCO stuff, which are regions such as sky; give instances_train2017.json"
            )
    return labels


def _annotations(file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    items = json_items(file, "annotations.item")
    for number, entry in enumerate(
        tqdm(items, desc=file.name, unit=" annotations", leave=False, delay=1, dynamic_ncols=True), 1
    ):
        yield entry, f"{file}, annotations, entry {number}"


def _get(entry: Any, key: str, where: str) -> Any:
    """A number or text of an entry."""
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, (str, int, float)):
        raise UserError(f"{where}: {key} is {value!r:.60}; a file of COCO's gives each entry one")
    return value
