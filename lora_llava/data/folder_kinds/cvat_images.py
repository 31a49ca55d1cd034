"""CVAT's XML for images 1.1: tags, attributes and boxes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element

from lora_llava.core.errors import UserError
from lora_llava.data.folder_kinds.box_questions import BoxedImage, ObjectBox, add_box_questions, box_kinds
from lora_llava.data.folder_kinds.folder_kind import (
    ConvertedFolder,
    FolderKind,
    FolderOptions,
    ImageFinder,
    ask_question,
    class_question,
    class_text,
    counted,
    is_only_class,
    split_named,
    split_of,
)
from lora_llava.data.folder_kinds.label_files import xml_elements, xml_root

_SHAPES = ("box", "polygon")


@dataclass(frozen=True)
class _CvatImage:
    """An image of the file with its path, split and element's content."""

    name: str
    image: str
    split: str
    tags: tuple[str, ...]
    boxes: tuple[ObjectBox, ...]
    attributes: tuple[tuple[str, str, str], ...]
    """Label, attribute and value."""
    has_others: bool
    """Whether it has annotations that are not read, so that what is not in it is unknown."""


class CvatImages(FolderKind):
    """`<annotations><image name=...><tag label=.../><box label=.../></image></annotations>`."""

    summary = "CVAT for images"

    def find(self, folder: Path, files: Sequence[Path]) -> list[Path]:
        return [file for file in files if file.suffix.lower() == ".xml" and xml_root(file) == "annotations"]

    def convert(self, folder: Path, files: Sequence[Path], options: FolderOptions) -> ConvertedFolder:
        box_kinds(options)
        found = ConvertedFolder(self.summary)
        finder = ImageFinder(folder, options.follow_links, found.left_out)
        marked = [each for file in files for each in _marked(folder, file, finder, found)]
        _add_tags(found, marked, options)
        _add_attributes(found, marked)
        boxed = [
            BoxedImage(each.name, each.image, each.split, each.boxes)
            for each in marked
            if not each.has_others and (each.boxes or not (each.tags or each.attributes))
        ]
        if any(each.boxes for each in boxed):
            add_box_questions(found, boxed, options)
            for other in (each for each in marked if each.boxes and each.has_others):
                reason = "boxes of images with other annotations that are not read"
                found.left_out.add(reason, other.image, len(other.boxes))
        else:
            for each in boxed:
                found.left_out.add("images without an annotation that is read", each.image)
        if not found.splits:
            raise UserError(
                f"{files[0]}: no image in {folder} has a tag, an attribute or a box; "
                f"{'; '.join(found.left_out.lines()) or 'it has no image'}; export it again, with its images"
            )
        return found


def _marked(folder: Path, file: Path, finder: ImageFinder, found: ConvertedFolder) -> list[_CvatImage]:
    beside = file.parent.relative_to(folder).as_posix() if file.parent.is_relative_to(folder) else ""
    marked = []
    for element in xml_elements(file, ("image", "track")):
        if element.tag == "track":
            raise UserError(f"{file}: it is CVAT for video, with tracks; export the task as CVAT for images 1.1")
        name = element.get("name", "")
        image = finder.find(name, beside, "entries")
        if image is not None:
            row_name = f"{file.name} image {element.get('id', name)}"
            split = split_named(element.get("subset", "")) or split_of(file, folder)
            marked.append(_read_image(element, row_name, image, split, found))
    return marked


def _read_image(element: Element, name: str, image: str, split: str, found: ConvertedFolder) -> _CvatImage:
    boxes, attributes = [], []
    for each in element:
        label = class_text(each.get("label", ""))
        if each.tag in _SHAPES and label:
            boxes.append(ObjectBox(label, *_center(each, element)))
        elif each.tag != "tag":
            found.left_out.add(f"annotations of type {each.tag}, which are not read", name)
    counts = Counter(box.label for box in boxes)
    for each in element:
        label = class_text(each.get("label", ""))
        for value in each.iter("attribute"):
            text = (value.text or "").strip()
            if not text:
                found.left_out.add("attributes without a value", name)
            elif each.tag == "tag" or counts[label] == 1:
                attributes.append((label, class_text(value.get("name", "")), text))
            else:
                found.left_out.add("attributes of boxes that share their label with others", name)
    tags = tuple(class_text(each.get("label", "")) for each in element if each.tag == "tag" and each.get("label"))
    has_others = any(each.tag != "tag" and not (each.tag in _SHAPES and each.get("label")) for each in element)
    return _CvatImage(name, image, split, tags, tuple(boxes), tuple(attributes), has_others)


def _center(shape: Element, image: Element) -> tuple[float | None, float | None]:
    """Return the centre as shares of the image's size."""
    try:
        across, down = float(image.get("width", "")), float(image.get("height", ""))
        if shape.tag == "box":
            left, top, right, bottom = (float(shape.get(key, "")) for key in ("xtl", "ytl", "xbr", "ybr"))
            return (left + right) / 2 / across, (top + bottom) / 2 / down
        points = [tuple(map(float, point.split(","))) for point in shape.get("points", "").split(";")]
        return sum(p[0] for p in points) / len(points) / across, sum(p[1] for p in points) / len(points) / down
    except (ValueError, ZeroDivisionError, IndexError):
        return None, None


def _add_tags(found: ConvertedFolder, marked: Sequence[_CvatImage], options: FolderOptions) -> None:
    tagged = [each for each in marked if each.tags]
    if not tagged or is_only_class((", ".join(each.tags) for each in tagged), "tags", found.left_out):
        return
    question = ask_question(options, class_question(tag for each in tagged for tag in each.tags))
    for each in tagged:
        answer = ", ".join(dict.fromkeys(each.tags))
        found.add(each.split, {"id": f"{each.name} tag", "image": each.image, "question": question, "answer": answer})
    found.facts.append(("tags", counted(Counter(tag for each in tagged for tag in each.tags))))
    found.facts.append(("question about tags", question))


def _add_attributes(found: ConvertedFolder, marked: Sequence[_CvatImage]) -> None:
    kinds: Counter[str] = Counter()
    for each in marked:
        for label, attribute, value in each.attributes:
            kinds[f"{attribute} of {label}"] += 1
            row = {
                "id": f"{each.name} {label} {attribute}",
                "image": each.image,
                "question": f'What is the {attribute} of the "{label}"?',
                "answer": value,
                "question_type": attribute,
            }
            found.add(each.split, row)
    if kinds:
        found.facts.append(("attributes", counted(kinds)))
