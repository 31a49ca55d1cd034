"""Builder that joins captions and boxes by image and stores them as bytes."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Literal

from lora_llava.core.errors import UserError
from lora_llava.data.images.image_names import COCO_NAME

BoxPolicy = Literal["clip", "error"]
Corners = tuple[float, float, float, float]
LARGEST = 1e300
"""Largest number of a box or size; sums of larger numbers may not fit a float."""
_HALF = 0.0005
"""Largest distance of a corner outside the image that is treated as rounding, as three decimals do not show it."""


@dataclass
class ContextReport:
    """Counts of what was read, changed and dropped.

    Attributes:
        images: Images with captions, boxes or both.
        captions: Captions of these images.
        boxes: Boxes of these images.
        captions_alone: Images with captions and no boxes.
        boxes_alone: Images with boxes and no captions.
        empty_captions: Captions dropped because they are empty.
        repeated_captions: Captions dropped because the image has an equal one.
        crowd_regions: Boxes dropped because they surround many objects (COCO's `iscrowd`).
        clipped_boxes: Boxes that reached out of the image and were clipped to it.
        dropped_boxes: Boxes dropped because they lie outside the image or have no area.
        repeated_boxes: Boxes dropped because the same boxes were given for the image before.
        unlisted_annotations: Annotations dropped because their file does not list the image.
        images_without_anything: Images dropped because they have neither a caption nor a box.
        missing_images: Images dropped because they are not in the image folder.
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
        """Write the counts on one line, without those that are 0."""
        always = ("images", "captions", "boxes")
        counts = {name: count for name, count in asdict(self).items() if count or name in always}
        return ", ".join(f"{name.replace('_', ' ')}: {count:,}" for name, count in counts.items())


def clean_text(text: str) -> str:
    """Clean a text to one line for use in a prompt.

    Args:
        text: Text as in a file.

    Returns:
        The text without control characters and unpaired surrogates, which UTF-8 cannot encode. Each run of white space
        becomes one space, and white space around the text is removed.
    """
    if not text.isprintable():
        text = "".join(sign for sign in text if sign.isspace() or unicodedata.category(sign) not in ("Cc", "Cs"))
    return " ".join(text.split())


def corners_of(numbers: Sequence[float], *, sized: bool) -> Corners:
    """Convert a box to its two corners.

    Args:
        numbers: x1, y1, x2, y2, or x, y, width, height.
        sized: Whether the numbers are x, y, width, height.

    Returns:
        x1, y1, x2, y2.
    """
    x, y, right, below = numbers
    return (x, y, x + right, y + below) if sized else (x, y, right, below)


def scale(corners: Corners, width: float, height: float) -> Corners:
    """Convert corners in pixels to fractions of the image's width and height."""
    x1, y1, x2, y2 = corners
    return x1 / width, y1 / height, x2 / width, y2 / height


def box_numbers(value: Any, where: str) -> Corners:
    """Check that a value of a file is a list of four numbers up to `LARGEST`, and return them.

    Raises:
        UserError: If it is not.
    """
    is_list = isinstance(value, (list, tuple)) and len(value) == 4
    if not is_list or any(
        isinstance(x, bool) or not isinstance(x, (int, float)) or not abs(x) <= LARGEST for x in value
    ):
        raise UserError(f"{where}: bbox is {value!r:.80}; it must be a list of four numbers")
    x1, y1, x2, y2 = value
    return x1, y1, x2, y2


class ContextBuilder:
    """Collector of captions and boxes by image.

    The names of an image in COCO's releases of 2014 and 2017 count as one image, under the name that was read first.

    Args:
        on_bad_box: Handling of a box that reaches out of its image, lies outside it or has no area: `clip` clips it, or
            drops it if nothing is left, and counts it; `error` raises.

    Attributes:
        report: Counts of what was dropped so far; `finish` adds the counts of the result.
    """

    def __init__(self, on_bad_box: BoxPolicy = "clip") -> None:
        self.report = ContextReport()
        self._on_bad_box = on_bad_box
        self._names: dict[str, str] = {}
        self._captions: dict[str, bytes] = {}
        self._boxes: dict[str, bytes] = {}
        self._labels: dict[str, str] = {}

    def add_image(self, name: Any, where: str) -> str:
        """Register an image.

        Args:
            name: Image name as in the file.
            where: File and row, for messages.

        Returns:
            The name to use in the other methods.

        Raises:
            UserError: If the name is not that of a file in a folder: a URL, an absolute path, or a path with `..`.
        """
        match = COCO_NAME.fullmatch(name) if isinstance(name, str) else None
        key = match[1] if match else name
        if isinstance(name, str) and key in self._names:
            return self._names[key]
        if not isinstance(name, str) or not name.strip() or any(unicodedata.category(x) in ("Cc", "Cs") for x in name):
            raise UserError(f"{where}: the image's name is {name!r:.80}; it must be a file name")
        if "://" in name or name.startswith("data:"):
            raise UserError(f"{where}: image {name:.80} is a URL; give the name of its file in the image folder")
        paths = (PurePosixPath(name), PureWindowsPath(name))
        if any(path.anchor or ".." in path.parts for path in paths):
            raise UserError(
                f"{where}: image {name:.80} leads out of the image folder; give its path relative to that folder"
            )
        self._names[key] = name
        return name

    def add_captions(self, image: str, captions: Iterable[str]) -> None:
        """Add captions to an image, except empty and repeated ones.

        Args:
            image: Name from `add_image`.
            captions: Captions as in the file.
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
        """Set the boxes of an image.

        Args:
            image: Name from `add_image`.
            boxes: All boxes of the image: label, and corners as fractions of the image's size.
            where: File and row, for messages.
            rounded: Whether to round to three decimals, as LLaVA did with COCO's pixels; else numbers are kept.

        Raises:
            UserError: If a label is empty, a box is bad and `on_bad_box` is `error`, or the image has other boxes.
        """
        lines = []
        for label, corners in boxes:
            fitted, wrong = _fit(corners)
            if wrong and self._on_bad_box == "error":
                box = f"box {label!r:.40} {list(corners)} of {image}"
                raise UserError(f"{where}: {box} {wrong}; fix it, or set on_bad_box to clip")
            self.report.dropped_boxes += fitted is None
            self.report.clipped_boxes += wrong is not None and fitted is not None
            if fitted is not None:
                numbers = [round(x, 3) for x in fitted] if rounded else fitted
                lines.append(f"[{self._label(label, where)},{','.join(map(repr, numbers))}]")
        content, known = "\n".join(lines).encode(), self._boxes.get(image)
        if content and known == content:
            self.report.repeated_boxes += len(lines)
        elif content and known is not None:
            raise UserError(
                f"{where}: {image} already has other boxes, from an earlier row or file; give its boxes once"
            )
        elif content:
            self._boxes[image] = content

    def _label(self, label: str, where: str) -> str:
        """Return a label as JSON, from a cache, since labels repeat."""
        if label not in self._labels:
            text = clean_text(label)
            if not text:
                raise UserError(f"{where}: a box has an empty label; name its object")
            self._labels[label] = json.dumps(text, ensure_ascii=False)
        return self._labels[label]

    def finish(self, is_there: Callable[[str], bool]) -> dict[str, bytes]:
        """Return the captions and boxes of every image as JSON, `[[caption, ...], [[label, x1, y1, x2, y2], ...]]`.

        Args:
            is_there: Function that checks whether an image is available.

        Returns:
            JSON by image name, sorted, for available images with a caption or a box; the report counts them.
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
    """Clip a box to the image; returns None if nothing is left, and a description of the problem, if any."""
    # Numbers within the image keep their type, so that the prompt shows 1 or 1.0 as the file does; -0.0 becomes 0.0.
    x1, y1, x2, y2 = fitted = [abs(x) if 0 <= x <= 1 else float(x > 1) for x in corners]
    if x1 >= x2 or y1 >= y2:
        return None, "has no area within the image"
    reaches_out = min(corners) < -_HALF or max(corners) > 1 + _HALF
    return fitted, "reaches out of the image" if reaches_out else None
