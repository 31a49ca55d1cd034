"""Licences of bases and data, and where they pull apart. Facts read on the named pages in 2024 to 2026."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Licence:
    """What is known of a part's licence.

    Attributes:
        part: What it covers, as the card names it.
        name: The licence, or what is known of it.
        identifier: Hugging Face's identifier; None where there is none.
        commercial: Whether it allows commercial use; None where that is not known.
        note: What else a person should know.
    """

    part: str
    name: str
    identifier: str | None = None
    commercial: bool | None = None
    note: str = ""


_LLAMA2 = {"name": "Llama 2 Community License", "identifier": "llama2", "commercial": True}
_CLIP = {
    "name": "MIT",
    "identifier": "mit",
    "commercial": True,
    "note": "of github.com/openai/CLIP; its Hub page names none",
}
_KNOWN: dict[str, dict[str, object]] = {
    "demo": {"name": "Apache-2.0", "identifier": "apache-2.0", "commercial": True, "note": "part of lora_llava"},
    "lmsys/vicuna-7b-v1.5": _LLAMA2,
    "lmsys/vicuna-13b-v1.5": _LLAMA2,
    "llava-hf/llava-1.5-7b-hf": _LLAMA2,
    "llava-hf/llava-1.5-13b-hf": _LLAMA2,
    "liuhaotian/llava-v1.5-7b": _LLAMA2,
    "liuhaotian/llava-v1.5-13b": _LLAMA2,
    "openai/clip-vit-large-patch14": _CLIP,
    "openai/clip-vit-large-patch14-336": _CLIP,
    "derek-thomas/scienceqa": {
        "name": "CC BY-NC-SA 4.0",
        "identifier": "cc-by-nc-sa-4.0",
        "commercial": False,
        "note": "its authors (github.com/lupantech/ScienceQA) say CC BY-NC-SA 4.0, its Hub page CC BY-SA 4.0: the "
        "stricter is taken here",
    },
    "liuhaotian/llava-instruct-150k": {
        "name": "CC BY 4.0",
        "identifier": "cc-by-4.0",
        "commercial": None,
        "note": "made with GPT-4, so OpenAI's terms of use apply too",
    },
    "liuhaotian/llava-pretrain": {"name": "other", "note": "the terms of LAION, Conceptual Captions and SBU apply"},
    "liuhaotian/llava-cc3m-pretrain-595k": {"name": "other", "note": "the terms of Conceptual Captions apply"},
}


def licence_of(name: str, shown: str) -> Licence:
    """What is known of the licence of a model or data set.

    Args:
        name: A Hub id, a path or `demo`.
        shown: How the card names it.
    """
    known = _KNOWN.get(name.lower())
    if known is not None:
        return Licence(shown, **known)  # type: ignore[arg-type]
    return Licence(shown, "not known to lora_llava", note="see where it is from")


def card_licence(licences: Sequence[Licence]) -> str | None:
    """The identifier for the card: the parts' own if they share one, else `other`; None where none is known."""
    found = {licence.identifier for licence in licences}
    return next(iter(found), None) if len(found) < 2 else "other"


def conflicts(licences: Sequence[Licence]) -> list[str]:
    """Sentences on licences that do not go together."""
    found = []
    allow = [licence for licence in licences if licence.commercial]
    forbid = [licence for licence in licences if licence.commercial is False]
    for strict in forbid:
        for free in allow:
            found.append(
                f"{free.part} may be used commercially under the {free.name}, {strict.part} may not "
                f"({strict.name}): what was made from both falls under the stricter."
            )
    unknown = [licence.part for licence in licences if licence.identifier is None]
    if unknown:
        found.append(f"Not known to lora_llava, so read them before use: {', '.join(unknown)}.")
    return found
