"""What is known of an image in words: captions and boxes, all that the teacher sees of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Box:
    """One object.

    Attributes:
        label: Its category.
        corners: x1, y1, x2, y2 as fractions of the image's width and height, from 0 to 1 (arXiv 2304.08485,
            section 3: normalised between 0 and 1).
    """

    label: str
    corners: tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Context:
    """What is known of one image.

    Attributes:
        image: The image's file name, as rows will name it.
        captions: What people wrote about it.
        boxes: Its objects.
    """

    image: str
    captions: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()


def write_context(context: Context) -> str:
    """The text that the teacher reads, and a judge of the answers may.

    Args:
        context: Captions, boxes, or both.

    Returns:
        A caption a line, an empty line, a box a line: `label: [x1, y1, x2, y2]` rounded to three decimals, as
        LLaVA's own requests have it (arXiv 2304.08485, table 1).
    """
    boxes = [f"{box.label}: [{', '.join(f'{round(corner, 3)}' for corner in box.corners)}]" for box in context.boxes]
    return "\n\n".join("\n".join(part) for part in (context.captions, boxes) if part)
