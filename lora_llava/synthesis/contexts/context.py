"""Captions and boxes of an image: all that the teacher sees of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Box:
    """The bounding box of one object.

    Attributes:
        label: Category of the object.
        corners: x1, y1, x2, y2 as fractions of the image's width and height, from 0 to 1 (arXiv 2304.08485,
            section 3: normalised between 0 and 1).
    """

    label: str
    corners: tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Context:
    """Captions and boxes of one image.

    Attributes:
        image: File name of the image, as in the generated rows.
        captions: Captions of the image.
        boxes: Boxes of its objects.
    """

    image: str
    captions: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()


def write_context(context: Context) -> str:
    """Write a context as the text in the teacher's prompt.

    Args:
        context: Captions, boxes, or both.

    Returns:
        One caption per line, an empty line, and one box per line: `label: [x1, y1, x2, y2]` rounded to three decimals,
        as in LLaVA's own prompts (arXiv 2304.08485, table 1).
    """
    boxes = [f"{box.label}: [{', '.join(f'{round(corner, 3)}' for corner in box.corners)}]" for box in context.boxes]
    return "\n\n".join("\n".join(part) for part in (context.captions, boxes) if part)
