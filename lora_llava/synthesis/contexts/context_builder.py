"""Captions and boxes of many images, brought together by image and kept as bytes."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Literal

from lora_llava.core.errors import UserError
from lora_llava.data.images.image_names import COCO_NAME

BoxPolicy = Literal["clip", "error"]
Corners = tuple[float, float, float, float]
_HALF = 0.0005
"""Less than this, a corner outside the image is rounding: three decimals do not show it."""


@dataclass
class ContextReport:
    """What was read, and what of it was not used.

    Attributes:
        images: With captions, boxes or both.
        captions: Of these images.
        boxes: Of these images.
        captions_alone: Images with captions and no boxes.
        boxes_alone: Images with boxes and no captions.
        empty_captions: Dropped: nothing but white space.
        repeated_captions: Dropped: the image had the same one already.
        crowd_regions: Dropped: one box around many objects (COCO's `iscrowd`).
        clipped_boxes: Cut at the image's edge, out of which they reached.
        dropped_boxes: Outside the image altogether, or without area.
        repeated_boxes: Dropped: the image's boxes are given a second time, the same.
        unlisted_annotations: Dropped: of images that the file does not list.
        images_without_anything: Left out: no caption and no box.
        missing_images: Left out: not in the image folder.
    """

    images: int = 0
    captions: int = 0
    boxes: int = 0
    captions_alone: int = 0
    boxes_alone: int = 0
    empty_captions: int = 0
    repeated_captions: int = 0
    crowd_regions: int = 0
    clipped_boxes: int = 0
    dropped_boxes: int = 0
    repeated_boxes: int = 0
    unlisted_annotations: int = 0
    images_without_anything: int = 0
    missing_images: int = 0

    def __str__(self) -> str:
        """In one line, without what there is none of."""
        always = ("images", "captions", "boxes")
        counts = {name: count for name, count in asdict(self).items() if count or name in always}
        return ", ".join(f"{name.replace('_', ' ')}: {count:,}" for name, count in counts.items())


def clean_text(text: str) -> str:
    """A text on one line, as a prompt can hold it.

    Args:
        text: As a file has it.

    Returns:
        The same without control characters and halves of surrogate pairs, which UTF-8 cannot hold, and with one space
        for any white space within and none around it.
    """
    if not text.isprintable():
        text = "".join(sign for sign in text if sign.isspace() or unicodedata.category(sign) not in ("Cc", "Cs"))
    return " ".join(text.split())


def corners_of(numbers: Sequence[float], *, sized: bool) -> Corners:
    """The two corners of a box that is given by them, or by one and its size.

    Args:
        numbers: x1, y1, x2, y2; or x, y, width, height.
        sized: The latter.

    Returns:
        x1, y1, x2, y2.
    """
    x, y, right, below = numbers
    return (x, y, x + right, y + below) if sized else (x, y, right, below)


def scale(corners: Corners, width: float, height: float) -> Corners:
    """Corners in pixels as fractions of the image's width and height."""
    x1, y1, x2, y2 = corners
    return x1 / width, y1 / height, x2 / width, y2 / height


def box_numbers(value: Any, where: str) -> Corners:
    """The four numbers of a box as a file has it.

    Raises:
        UserError: For anything else.
    """
    is_list = isinstance(value, (list, tuple)) and len(value) == 4
    if not is_list or any(isinstance(x, bool) or not isinstance(x, (int, float)) or not isfinite(x) for x in value):
        raise UserError(f"{where}: bbox is {value!r:.80}; it should be a list of four numbers")
    x1, y1, x2, y2 = value
    return x1, y1, x2, y2


class ContextBuilder:
    """Collects what files say of images.

    COCO's two names of an image, 2014's and 2017's, are one image here; it keeps the name that was read first.

    Args:
        on_bad_box: What is done with a box that reaches out of its image, lies outside or has no area: `clip` cuts
            it, or drops it where nothing is left, and counts it; `error` raises.

    Attributes:
        report: What was dropped so far; what is left is counted by `finish`.
    """

    def __init__(self, on_bad_box: BoxPolicy = "clip") -> None:
        self.report = ContextReport()
        self._on_bad_box = on_bad_box
        self._names: dict[str, str] = {}
        self._captions: dict[str, bytes] = {}
        self._boxes: dict[str, bytes] = {}
        self._labels: dict[str, str] = {}

    def add_image(self, name: Any, where: str) -> str:
        """Hold an image's name, with or without anything known of it.

        Args:
            name: As the file has it.
            where: The file and row, for messages.

        Returns:
            What the image is called from here on.

        Raises:
            UserError: For what is no name of a file in a folder: a URL, an absolute name, one with `..` in it.
        """
        match = COCO_NAME.fullmatch(name) if isinstance(name, str) else None
        key = match[1] if match else name
        if isinstance(name, str) and key in self._names:
            return self._names[key]
        if not isinstance(name, str) or not name.strip() or any(unicodedata.category(x) in ("Cc", "Cs") for x in name):
            raise UserError(f"{where}: the image's name is {name!r:.80}; it should be the name of its file")
        if "://" in name or name.startswith("data:"):
            raise UserError(f"{where}: image {name:.80} is a URL; give the name of its file in the image folder")
        paths = (PurePosixPath(name), PureWindowsPath(name))
        if any(path.anchor or ".." in path.parts for path in paths):
            raise UserError(f"{where}: image {name:.80} leads out of the image folder; name it from there")
        self._names[key] = name
        return name

    def add_captions(self, image: str, captions: Iterable[str]) -> None:
        """Add to an image's captions those that it has not yet.

        Args:
            image: From `add_image`.
            captions: As the file has them.
        """
        known = self._captions.get(image, b"")
        lines = known.split(b"\n") if known else []
        for caption in captions:
            text = clean_text(caption)
            line = json.dumps(text, ensure_ascii=False).encode()
            if not text:
                self.report.empty_captions += 1
            elif line in lines:
                self.report.repeated_captions += 1
            else:
                lines.append(line)
        if lines:
            self._captions[image] = b"\n".join(lines)

    def add_boxes(self, image: str, boxes: Iterable[tuple[str, Corners]], where: str, *, rounded: bool) -> None:
        """Give an image its boxes, all at once.

        Args:
            image: From `add_image`.
            boxes: Label and corners as fractions of the image's size.
            where: The file and row, for messages.
            rounded: Round to three decimals, as LLaVA did with COCO's pixels; else numbers stay as they are.

        Raises:
            UserError: For a label that is empty, a bad box where such are errors, and an image that has other boxes.
        """
        lines = []
        for label, corners in boxes:
            fitted, wrong = _fit(corners)
            if wrong and self._on_bad_box == "error":
                box = f"box {label!r:.40} {list(corners)} of {image}"
                raise UserError(f"{where}: {box} {wrong}; mend it, or set on_bad_box to clip")
            self.report.dropped_boxes += fitted is None
            self.report.clipped_boxes += wrong is not None and fitted is not None
            if fitted is not None:
                numbers = [round(x, 3) for x in fitted] if rounded else fitted
                lines.append(f"[{self._label(label, where)},{','.join(map(repr, numbers))}]")
        content, known = "\n".join(lines).encode(), self._boxes.get(image)
        if content and known == content:
            self.report.repeated_boxes += len(lines)
        elif content and known is not None:
            raise UserError(f"{where}: {image} has other boxes already, from an earlier row or file; give them once")
        elif content:
            self._boxes[image] = content

    def _label(self, label: str, where: str) -> str:
        """A label as JSON; there are few of them."""
        if label not in self._labels:
            text = clean_text(label)
            if not text:
                raise UserError(f"{where}: a box has no label; say what it is")
            self._labels[label] = json.dumps(text, ensure_ascii=False)
        return self._labels[label]

    def finish(self, is_there: Callable[[str], bool]) -> dict[str, bytes]:
        """Every image's captions and boxes, `[[caption, ...], [[label, x1, y1, x2, y2], ...]]` in JSON.

        Args:
            is_there: Whether an image can be used.

        Returns:
            By name, in its order, those images of which something is known; the report counts them.
        """
        found: dict[str, bytes] = {}
        report = self.report
        for name in sorted(self._names.values()):
            captions, boxes = self._captions.pop(name, b""), self._boxes.pop(name, b"")
            if not captions and not boxes:
                report.images_without_anything += 1
            elif not is_there(name):
                report.missing_images += 1
            else:
                report.images += 1
                report.captions += captions.count(b"\n") + bool(captions)
                report.boxes += boxes.count(b"\n") + bool(boxes)
                report.captions_alone += not boxes
                report.boxes_alone += not captions
                found[name] = b"[[%b],[%b]]" % (captions.replace(b"\n", b","), boxes.replace(b"\n", b","))
        return found


def _fit(corners: Corners) -> tuple[Sequence[float] | None, str | None]:
    """A box within the image, or None where nothing of it is; and what was wrong with it."""
    # Numbers that are fine stay what they are, so that the prompt shows 1 or 1.0 as the file does; -0.0 is 0.0.
    x1, y1, x2, y2 = fitted = [abs(x) if 0 <= x <= 1 else float(x > 1) for x in corners]
    if x1 >= x2 or y1 >= y2:
        return None, "has no area within the image"
    reaches_out = min(corners) < -_HALF or max(corners) > 1 + _HALF
    return fitted, "reaches out of the image" if reaches_out else None
