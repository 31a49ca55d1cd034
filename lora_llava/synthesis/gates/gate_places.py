"""Gate for left and right confused, according to the boxes."""

from __future__ import annotations

import re

from lora_llava.synthesis.contexts.context import Context
from lora_llava.synthesis.gates.gate_claims import sentences_of, skip_adjectives
from lora_llava.synthesis.gates.gate_nouns import Known, noun_at, tokens_of

_SIDE = re.compile(
    r"(?: (?!(?:the|an?|and|or|with|of) )[a-z]+){1,4}? (?:to|on|at) the (?:far )?(?P<side>left|right)"
    r"(?: side| hand side|-hand side)? of "
    r"(?:(?P<whole>(?:the|this) (?:picture|image|photo|photograph|scene|frame)\b)|(?:the|an?) (?P<rest>.*))"
)


def wrong_place(context: Context, known: Known, answer: str) -> str | None:
    """Find left and right confused: between two objects that occur once each, or for one object in the image.

    Args:
        context: The image's boxes.
        known: The context's counts.
        answer: The answer.

    Returns:
        A description of the wrong place, or None. An object is misplaced only if its box lies entirely on the other
        side.
    """
    for sentence in sentences_of(tokens_of(answer)):
        text = re.sub(r"^(?:yes|no) , ", "", " ".join(sentence))
        tokens = re.sub(r"^(?:the|an?|one) ", "", text).split()
        start = skip_adjectives(tokens, 0)
        found = noun_at(tokens, start, known.nouns)
        match = found and _SIDE.match("".join(f" {token}" for token in tokens[found[1] :]))
        if not found or not match or {"not", "n't", "isn't"}.intersection(sentence):
            continue
        own = _only_span(context, known, found[0])
        other: tuple[str, int] | None = None
        if match["rest"] is not None:
            there = match["rest"].split()
            other = noun_at(there, skip_adjectives(there, 0), known.nouns)
        # "Left of the image" means its left half: an object entirely in the right half is misplaced.
        against = (0.5, 0.5) if match["whole"] else _only_span(context, known, other[0]) if other else None
        if own is None or against is None:
            continue
        if own[0] >= against[1] if match["side"] == "left" else own[1] <= against[0]:
            what = other[0] if other else "the image"
            return f'"{found[0]} {match["side"]} of {what}" but the boxes show otherwise'
    return None


def _only_span(context: Context, known: Known, form: str) -> tuple[float, float] | None:
    """Return the left and right edge of the only object of this name; None if it is not the only one."""
    noun = known.nouns[form]
    if noun.relation == "wider" or noun.plural or known.most(noun) != 1 or known.count(noun) != 1:
        return None
    label = noun.labels[0]
    box = next(box for box in context.boxes if " ".join(box.label.lower().split()) == label)
    return box.corners[0], box.corners[2]
