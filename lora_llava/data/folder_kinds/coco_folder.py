"""COCO's annotations: captions, and boxes that become questions about presence, count and place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_llava.core.errors import UserError
from lora_llava.data.folder_kinds.box_questions import BoxedImage, ObjectBox, add_box_questions, box_kinds
from lora_llava.data.folder_kinds.folder_kind import (
    ConvertedFolder,
    FolderKind,
    FolderOptions,
    ImageFinder,
    class_text,
    split_of,
)
from lora_llava.data.folder_kinds.label_files import json_object


class CocoFolder(FolderKind):
    """`{"images": [...], "annotations": [...], "categories": [...]}`."""

    summary = "COCO annotations"

    def find(self, folder: Path, files: Sequence[Path]) -> list[Path]:
        return [file for file in files if isinstance(json_object(file).get("images"), list) and _annotations(file)]

    def convert(self, folder: Path, files: Sequence[Path], options: FolderOptions) -> ConvertedFolder:
        box_kinds(options)
        options.used.add("ask")
        captions = [file for file in files if any("caption" in each for each in _annotations(file))]
        boxes = [file for file in files if file not in captions and any(map(_has_box, _annotations(file)))]
        if not captions and not boxes:
            raise UserError(
                f"{files[0]}: its annotations have neither caption nor bbox; export COCO captions or detection"
            )
        wants_captions = bool(captions) and (not options.ask or "captions" in options.ask)
        if not wants_captions and not boxes:
            raise UserError(f"{files[0]}: it has captions and no boxes; leave out --ask, or use --ask captions")
        if options.ask == ("captions",) and not captions:
            raise UserError(f"{files[0]}: it has boxes and no captions; use --ask presence,count,place")
        used = captions if wants_captions else boxes
        what = "captions" if wants_captions else "detection"
        found = ConvertedFolder(f"COCO {what}", form="captions" if wants_captions else "conversations")
        found.facts.append(("files", ", ".join(file.relative_to(folder).as_posix() for file in used)))
        for file in files:
            if file not in used:
                use = ", which --ask presence,count,place uses" if file in boxes else ", which are of another kind"
                found.left_out.add(f"annotations in {file.name}{use}", count=len(_annotations(file)))
        if wants_captions:
            _convert_captions(found, folder, used, options)
        else:
            _convert_boxes(found, folder, used, options)
        return found


def _annotations(file: Path) -> list[Mapping[str, Any]]:
    content = json_object(file)
    listed = content.get("annotations")
    if not isinstance(listed, list) or "questions" in content:
        return []
    found = [each for each in listed if isinstance(each, Mapping)]
    return found if any("image_id" in each and "question_id" not in each for each in found) else []


def _key(annotation: Mapping[str, Any], name: str) -> Any:
    """Return an id of an annotation; as text where it is neither a number nor text."""
    value = annotation.get(name)
    return value if isinstance(value, (int, str)) else repr(value)[:40]


def _has_box(annotation: Mapping[str, Any]) -> bool:
    return "category_id" in annotation and "caption" not in annotation


def _images(file: Path, found: ConvertedFolder) -> dict[Any, Mapping[str, Any]]:
    """Return the entries of images by their id; a repeated id keeps its first entry."""
    images: dict[Any, Mapping[str, Any]] = {}
    for each in json_object(file)["images"]:
        if not isinstance(each, Mapping) or not isinstance(each.get("id"), (int, str)):
            found.left_out.add("images without an id", f"{each!r:.40}")
        elif each["id"] in images:
            found.left_out.add("entries with the id of another image", each["id"])
        else:
            images[each["id"]] = each
    return images


def _resolved(
    file: Path, folder: Path, finder: ImageFinder, found: ConvertedFolder, used: Counter[Any], what: str
) -> Iterator[tuple[Any, Mapping[str, Any], str]]:
    """Yield the id, the entry and the path of each image that exists; `used` counts the annotations of each id."""
    beside = file.parent.relative_to(folder).as_posix() if file.parent.is_relative_to(folder) else ""
    images = _images(file, found)
    for key, entry in images.items():
        image = finder.find(entry.get("file_name"), beside, "entries")
        if image is not None:
            yield key, entry, image
        elif used[key]:
            found.left_out.add(f"{what} of such an entry", key, used[key])
    for key in (key for key in used if key not in images):
        found.left_out.add(f"{what} with an image_id that no image has", key, used[key])


def _convert_captions(found: ConvertedFolder, folder: Path, files: Sequence[Path], options: FolderOptions) -> None:
    finder = ImageFinder(folder, options.follow_links, found.left_out)
    for file in files:
        by_image: dict[Any, list[tuple[Any, str]]] = {}
        for place, each in enumerate(_annotations(file)):
            text = each.get("caption")
            if isinstance(text, str) and text.strip():
                by_image.setdefault(_key(each, "image_id"), []).append((each.get("id", place), " ".join(text.split())))
            else:
                found.left_out.add("captions without text", f"{file.name} annotation {place}")
        counts = Counter({key: len(texts) for key, texts in by_image.items()})
        for key, _, image in _resolved(file, folder, finder, found, counts, "captions"):
            if key not in by_image:
                found.left_out.add("images without a caption", image)
            for number, text in by_image.get(key, ()):
                row = {"id": f"{file.name} annotation {number}", "image": image, "caption": text}
                found.add(split_of(file, folder), row)


def _convert_boxes(found: ConvertedFolder, folder: Path, files: Sequence[Path], options: FolderOptions) -> None:
    finder = ImageFinder(folder, options.follow_links, found.left_out)
    boxed = []
    for file in files:
        names = _categories(file)
        by_image: dict[Any, list[Mapping[str, Any]]] = {}
        for each in _annotations(file):
            if _key(each, "category_id") in names:
                by_image.setdefault(_key(each, "image_id"), []).append(each)
            else:
                found.left_out.add("boxes whose category_id is not in categories", _key(each, "category_id"))
        counts = Counter({key: len(each) for key, each in by_image.items()})
        for key, entry, image in _resolved(file, folder, finder, found, counts, "boxes"):
            boxes = tuple(
                ObjectBox(names[each["category_id"]], *_center(each, entry), bool(each.get("iscrowd")))
                for each in by_image.get(key, ())
            )
            boxed.append(BoxedImage(f"{file.name} image {key}", image, split_of(file, folder), boxes))
    add_box_questions(found, boxed, options)


def _categories(file: Path) -> dict[Any, str]:
    listed = json_object(file).get("categories")
    names = {
        each["id"]: class_text(str(each["name"]))
        for each in (listed if isinstance(listed, list) else [])
        if isinstance(each, Mapping) and isinstance(each.get("id"), (int, str)) and each.get("name")
    }
    if not names:
        raise UserError(
            f"{file}: it has boxes and no categories, so their labels have no names; add "
            '"categories": [{"id": 1, "name": "..."}, ...], or export it again with its categories'
        )
    return names


def _center(annotation: Mapping[str, Any], image: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Return a box's centre as shares of the image's size; None without a box or a size."""
    try:
        x, y, width, height = (float(value) for value in annotation["bbox"])
        across, down = float(image["width"]), float(image["height"])
    except (KeyError, TypeError, ValueError):
        return None, None
    if across <= 0 or down <= 0:
        return None, None
    return (x + width / 2) / across, (y + height / 2) / down
