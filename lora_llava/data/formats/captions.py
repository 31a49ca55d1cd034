"""Rows with an image and its caption, which becomes the answer to a request for a brief description."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, ClassVar

from lora_llava.data.conversation import IMAGE_PLACEHOLDER
from lora_llava.data.formats.shared import Columns, Detected, RowFormat, Sample, cell_text

BRIEF_REQUESTS = (
    "Describe the image concisely.",
    "Provide a brief description of the given image.",
    "Offer a succinct explanation of the picture presented.",
    "Summarize the visual content of the image.",
    "Give a short and clear explanation of the subsequent image.",
    "Share a concise interpretation of the image provided.",
    "Present a compact description of the photo's key features.",
    "Relay a brief, clear account of the picture shown.",
    "Render a clear and concise summary of the photo.",
    "Write a terse but informative summary of the picture.",
    "Create a compact narrative representing the image presented.",
)
"""The requests that captions answer (LLaVA, arXiv 2304.08485, section 4.2 and appendix, table 11)."""


class Captions(RowFormat):
    """`{"id", "image", "caption"}`."""

    precedence = 40
    summary = "a table of image, caption"
    choices = ("captions",)
    aliases: ClassVar = {"caption": ("caption", "description", "text", "blip_caption")}
    is_fallback = True

    def needs(self, columns: Columns) -> tuple[str, ...]:
        return (columns.caption,)

    def messages(self, row: Mapping[str, Any], match: str, columns: Columns, rng: random.Random) -> list[Any]:
        request = {"from": "human", "value": f"{IMAGE_PLACEHOLDER}\n{rng.choice(BRIEF_REQUESTS)}"}
        return [request, {"from": "gpt", "value": cell_text(row, columns.caption)}]

    def detect(self, sample: Sample) -> Detected | None:
        image, caption = sample.roles.get("image"), sample.roles.get("caption") or sample.roles.get("answer")
        if not image or not caption:
            return None
        return Detected("captions", f"captions: {image}, {caption}", sample.columns(caption=caption))


FORMAT = Captions()
