"""Questions about labelled boxes by rule: whether a label is in the image, how often, and where."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lora_llava.core.errors import UserError
from lora_llava.data.folder_kinds.folder_kind import ASKED, ConvertedFolder, FolderOptions, counted, number_of

PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")


@dataclass(frozen=True)
class ObjectBox:
    """A labelled box, or another outline, of an image.

    Attributes:
        label: Its label.
        x: Its centre from the left, as a share of the image's width; None if unknown.
        y: Its centre from the top, as a share of the image's height; None if unknown.
        is_crowd: Whether it is around many things of the label, which are not counted.
    """

    label: str
    x: float | None = None
    y: float | None = None
    is_crowd: bool = False

    @property
    def has_center(self) -> bool:
        """Whether its centre is known."""
        return all(value is not None and math.isfinite(value) for value in (self.x, self.y))


@dataclass(frozen=True)
class BoxedImage:
    """An image with its boxes.

    Attributes:
        name: The row's name: the file and the number of the image in it.
        image: The image's path relative to the folder.
        split: Its split.
        boxes: Its boxes; an image without any is one in which nothing was found.
    """

    name: str
    image: str
    split: str
    boxes: tuple[ObjectBox, ...]


def box_kinds(options: FolderOptions) -> tuple[str, ...]:
    """Return what is asked about boxes.

    Raises:
        UserError: For something that is not a kind of question.
    """
    unknown = [kind for kind in options.ask if kind not in ASKED]
    if unknown:
        raise UserError(f"--ask {unknown[0]}: it should be some of {', '.join(ASKED)}, with commas between them")
    return tuple(kind for kind in ASKED[:3] if not options.ask or kind in options.ask)


def add_box_questions(found: ConvertedFolder, images: Sequence[BoxedImage], options: FolderOptions) -> None:
    """Add the questions about boxes to a converted folder: at most two about presence, one count and one place each.

    Which labels are asked about is drawn with a seed; as many are asked about that are there as that are not.

    Args:
        found: The folder; its splits and facts are extended.
        images: All images with their boxes.
        options: What the person chose.
    """
    kinds = box_kinds(options)
    options.used.add("ask")
    if not kinds:
        raise UserError(f"--ask captions needs COCO captions; {found.shape} has boxes: use --ask {','.join(ASKED[:3])}")
    if "captions" in options.ask:
        found.facts.append(("captions", "not asked: there are none beside these boxes"))
    labels = Counter(box.label for each in images for box in each.boxes)
    if len(labels) == 1 and all(each.boxes for each in images) and "presence" in kinds:
        kinds = tuple(kind for kind in kinds if kind != "presence")
        found.facts.append(("presence", f"not asked: every image has {next(iter(labels))}"))
    asked: Counter[str] = Counter()
    for each in images:
        rows = list(_questions(each, sorted(labels), kinds))
        asked.update(row["question_type"] for row in rows)
        found.add(each.split, *rows)
        if not rows:
            found.left_out.add("images about which nothing can be asked", each.image)
    found.facts.append(("boxes", f"{sum(labels.values()):,} in {number_of(len(images), 'image')}: {counted(labels)}"))
    bare = sum(not each.boxes for each in images)
    if bare:
        found.facts.append(("without a box", f"{number_of(bare, 'image')}, read as showing none of the labels"))
    found.facts.append(("questions by rule", f"{counted(asked)}; choose with --ask {','.join(ASKED[:3])}"))
    if "place" in kinds:
        found.facts.append(("place", "asked where a label has one box: the ninth of the image with its center"))


def _questions(image: BoxedImage, labels: Sequence[str], kinds: Iterable[str]) -> Iterable[dict[str, Any]]:
    rng = random.Random(f"questions {image.image}")
    here = Counter(box.label for box in image.boxes)
    crowds = {box.label for box in image.boxes if box.is_crowd}
    others = [label for label in labels if label not in here]
    if "presence" in kinds:
        if here:
            yield _row(image, "presence", _PRESENT.format(rng.choice(sorted(here))), "yes", "yes")
        if others:
            yield _row(image, "presence", _PRESENT.format(rng.choice(others)), "no", "no")
    countable = sorted(here.keys() - crowds)
    if "count" in kinds and countable:
        label = rng.choice(countable)
        yield _row(image, "count", f'How many objects of the kind "{label}" are in the image?', str(here[label]))
    single = [box for box in image.boxes if here[box.label] == 1 and not box.is_crowd and box.has_center]
    if "place" in kinds and single:
        box = rng.choice(single)
        question = f'Where in the image is the "{box.label}"? Answer with one of: {", ".join(PLACES)}.'
        yield _row(image, "place", question, _place(box))


_PRESENT = 'Is there an object of the kind "{}" in the image? Answer yes or no.'


def _row(image: BoxedImage, kind: str, question: str, answer: str, note: str = "") -> dict[str, Any]:
    return {
        "id": f"{image.name} {kind}{f' {note}' if note else ''}",
        "image": image.image,
        "question": question,
        "answer": answer,
        "question_type": kind,
    }


def _place(box: ObjectBox) -> str:
    assert box.x is not None  # checked where the box is chosen
    assert box.y is not None
    column, row = (min(2, max(0, int(value * 3))) for value in (box.x, box.y))
    return PLACES[row * 3 + column]
