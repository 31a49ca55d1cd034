"""Licences of bases and data, and their conflicts. The facts are from the named pages, read in 2024 to 2026."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Licence:
    """The licence of one part of a model.

    Attributes:
        part: The part, as the card names it.
        name: The name of the licence, or what is known about it.
        identifier: Hugging Face's identifier; None if none exists.
        commercial: Whether it allows commercial use; None if unknown.
        note: Further information for the card.
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
    "note": "the licence of github.com/openai/CLIP; the Hub page names none",
}
_OWN = {"name": "Apache-2.0", "identifier": "apache-2.0", "commercial": True, "note": "part of lora_llava"}
_KNOWN: dict[str, dict[str, object]] = {
    "demo": _OWN,
    "demo_small": _OWN,
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
        "note": "stated by its authors on github.com/lupantech/ScienceQA; the Hub page states CC BY-SA 4.0, and the "
        "stricter licence is assumed here",
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
    """Return the known licence of a model or data set.

    Args:
        name: A Hub id, a path, `demo` or `demo_small`.
        shown: Its name in the card.
    """
    known = _KNOWN.get(name.lower())
    if known is not None:
        return Licence(shown, **known)  # type: ignore[arg-type]
    return Licence(shown, "unknown", note="see its source")


def card_licence(licences: Sequence[Licence]) -> str | None:
    """Return the identifier for the card: the one that all parts share, else `other`; None if none is known."""
    found = {licence.identifier for licence in licences}
    return next(iter(found), None) if len(found) < 2 else "other"


def conflicts(licences: Sequence[Licence]) -> list[str]:
    """Write sentences about licences that conflict or are unknown."""
    found = []
    allow = [licence for licence in licences if licence.commercial]
    forbid = [licence for licence in licences if licence.commercial is False]
    if allow and forbid:
        found.append(
            f"These licences differ on commercial use. It is allowed for {_list(allow)}, but not for {_list(forbid)}. "
            "This model is made from all of them, so the stricter terms apply."
        )
    unknown = [licence.part for licence in licences if licence.identifier is None]
    if unknown:
        found.append(f"Check these licences before use, because lora_llava does not know them: {', '.join(unknown)}.")
    return found


def _list(licences: Sequence[Licence]) -> str:
    return " and ".join(f"{licence.part} ({licence.name})" for licence in licences)
