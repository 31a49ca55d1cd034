"""The images that a row names: in its columns or in the parts of its messages."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

from lora_llava.data.formats.shared import Columns, RowError, listed

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
IMAGE_COLUMNS = (
    *("image", "images", "image_path", "image_paths", "image_file", "image_name", "img", "img_path"),
    *("picture", "pictures", "photo", "file_name", "filename", "file", "path"),
)
"""Names of the column of images that are found in the wild, the likeliest first."""
_SURE_COLUMNS = IMAGE_COLUMNS[:-4]
"""Those that name images whatever they hold; a file or a path may be something else."""
_LONGEST_NAME = 4096


def row_images(
    row: Mapping[str, Any], messages: Sequence[Any], columns: Columns, number: int | None = None
) -> tuple[str, ...]:
    """Return the names of a row's images.

    Args:
        row: The row.
        messages: The row's messages; their image parts name the images if no column does.
        columns: The table's columns.
        number: The row's number, if the table holds the images themselves; they are named by it.

    Raises:
        RowError: If images are named in both places, or a name is not a file's name.
    """
    given: list[Any] = []
    for column in dict.fromkeys((columns.image, "images")):
        value = listed(row.get(column, []), column)
        given += value if isinstance(value, (list, tuple)) else [value] if not _is_blank(value) else []
    inline = [name for message in messages for name in _inline_names(message)]
    if given and inline:
        raise RowError("both formats", f"its images are named in {columns.image} and in its messages; keep one")
    names = []
    for place, value in enumerate(given or inline):
        name = value.get("path") if isinstance(value, Mapping) else value
        name = name.strip() if isinstance(name, str) else name
        if number is not None:
            name = str(number) if len(given) == 1 else f"{number}:{place}"
        if not isinstance(name, str) or not name or "\0" in name:
            raise RowError("malformed row", f"an image's name is {value!r:.60}; it should be a file's name")
        names.append(name)
    return tuple(names)


def likely_image_column(row: Mapping[str, Any], known: Container[str]) -> str | None:
    """Return the column of a row that evidently names images, by its values' suffixes or by its name.

    Args:
        row: The row.
        known: Columns to ignore: their meaning is known.

    Returns:
        The likeliest column; None if no column names images.
    """
    others = {str(name): value for name, value in row.items() if name not in known}
    by_name = sorted(
        (name for name in others if _plain(name) in IMAGE_COLUMNS), key=lambda name: IMAGE_COLUMNS.index(_plain(name))
    )
    for name in dict.fromkeys([*by_name, *others]):
        if _names_images(others[name], _plain(name) in _SURE_COLUMNS):
            return name
    return None


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_").replace(" ", "_")


def _names_images(value: Any, sure: bool) -> bool:
    """Check whether a value is the name of an image file, an image stored in the table, or a list of them."""
    if isinstance(value, Mapping):
        return "path" in value and set(value) <= {"path", "bytes"}
    if isinstance(value, (list, tuple)):
        return bool(value) and all(_names_images(each, sure) for each in value)
    if not isinstance(value, str) or not value.strip() or len(value) > _LONGEST_NAME:
        return False
    try:
        found = listed(value, "")
    except RowError:
        return False
    if not isinstance(found, str):
        return _names_images(found, sure)
    name = value.strip()
    return "\n" not in name and (sure or name.lower().endswith(IMAGE_SUFFIXES))


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def _inline_names(message: Any) -> list[Any]:
    """Return the images that image parts name: by `image`, `path` or `url` (transformers) or `image_url` (OpenAI)."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, Sequence) or isinstance(content, str):
        return []
    found = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") not in ("image", "image_url"):
            continue
        url = part.get("image_url")
        nested = url.get("url") if isinstance(url, Mapping) else url
        found.append(next((v for v in (part.get("image"), part.get("path"), part.get("url"), nested) if v), None))
    return [name for name in found if name is not None]
