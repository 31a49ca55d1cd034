"""Gate for sums: `two cars and one truck, so three vehicles`."""

from __future__ import annotations

import re

from lora_llava.synthesis.gates.gate_claims import is_part, skip_adjectives
from lora_llava.synthesis.gates.gate_nouns import Known, Noun, noun_at

_PART = r"\d{1,4} (?:[a-z-]+ ){0,6}?[a-z-]+"
_JOIN = r"(?: ,)?(?: and| plus| with| as well as| \+| &)? "
_LIST = rf"{_PART}(?:{_JOIN}{_PART})+?"
_SO = (
    r"(?: [,;.:\u2013\u2014-])?(?: (?:and|which|that|this))?"
    r"(?: (?:so|making|makes|make|giving|gives|hence|thus|"
    r"therefore|for|totalling|totaling|totals|equals|is|are|adding up to|adds up to|add up to|"
    r"amounts to|in total|altogether|=))+"
    r"(?: (?:there (?:is|are)|we have|that is|that makes|a total of|in total|altogether|it is|,|all together|up))*"
)
_SUM = re.compile(rf"(?P<parts>{_LIST}){_SO} (?P<total>\d{{1,4}})(?P<after>(?: [a-z-]+){{0,4}})")
_NAMED_FIRST = re.compile(
    rf"(?P<total>\d{{1,4}}) (?P<after>(?:[a-z-]+ ){{1,7}})(?:[:\u2013\u2014(]|, namely|namely) "
    rf"(?P<parts>{_LIST})(?= [.,;)!]|$)"
)
_ANY_KIND = frozenset(
    ("things", "objects", "items", "animals", "people", "vehicles", "pieces", "total", "all", "altogether", "persons")
)


def wrong_sum(known: Known, tokens: list[str], is_whole: bool) -> str | None:
    """Find a sum that is wrong in itself, or whose parts or total the boxes contradict.

    Args:
        known: The context's counts.
        tokens: A sentence whose amounts are numbers in digits, from `rewrite_amounts`.
        is_whole: Whether the sentence is about the whole image.

    Returns:
        A description of the wrong sum, or None.
    """
    text = " ".join(tokens)
    match = _SUM.search(text) or _NAMED_FIRST.search(text)
    if match is None:
        return None
    parts = [_counted(known, part) for part in re.findall(r"\d{1,4}[^\d]*", match["parts"])]
    total, after = int(match["total"]), match["after"].split()
    noun = _noun(known, after)
    if not (noun or not after or _ANY_KIND.intersection(after)):
        return None  # "two adults and one child, so one room" is not a sum
    if noun and any(part and (part.labels, part.relation) == (noun.labels, noun.relation) for _, part in parts):
        return None  # "two dogs and a cat, so two dogs are left"
    added = sum(number for number, _ in parts)
    if added != total:
        return f'"{" and ".join(str(number) for number, _ in parts)}" are {added}, not {total}'
    is_whole = is_whole and not is_part(tokens)
    return next(filter(None, (_differs(known, *each, is_whole) for each in [*parts, (total, noun)])), None)


def _differs(known: Known, number: int, noun: Noun | None, is_whole: bool) -> str | None:
    """Compare a part or the total with the boxes."""
    if noun is None or not noun.countable or number in known.stated(noun):
        return None
    boxes = known.count(noun)
    exceeds = noun.relation != "wider" and number > known.most(noun)
    lacks = is_whole and noun.relation != "narrower" and number < boxes
    return f'"{number} {noun.labels[0]}" in a sum but the boxes show {boxes}' if exceeds or lacks else None


def _counted(known: Known, part: str) -> tuple[int, Noun | None]:
    """Return the number of a part and its noun, if it is known."""
    number, *rest = part.split()
    return int(number), _noun(known, rest)


def _noun(known: Known, tokens: list[str]) -> Noun | None:
    found = noun_at(tokens, skip_adjectives(tokens, 0), known.nouns)
    return known.nouns[found[0]] if found else None
