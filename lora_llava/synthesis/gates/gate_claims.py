"""Gates for claims that the boxes contradict: wrong counts and denied objects.

Boxes do not cover everything: crowds have none, and small objects may lack one. So a claim is checked only if its
wording is exact. A count is wrong if it is about the whole image and equals neither the boxes' nor a caption's count,
or if it exceeds both. A denial is wrong if nothing limits it to a part of the image or a kind of object. Claims about
objects without boxes, about colours, actions and ages, and vague numbers (`several`) are not checked.
Numbers in other forms than digits and words are `gate_amounts`' part.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lora_llava.synthesis.gates.gate_nouns import Known, Noun, noun_at, number_of, tokens_of, words

_IMAGE = r"(?:the|this) (?:whole |entire )?(?:picture|image|photo|photograph|scene|shot|frame|view)"
_SEEN = r"(?:visible|present|shown|seen|pictured|depicted|here|there|to be seen|around|anywhere|in sight|in view)"
_TOTAL = (
    rf"(?: (?:that|which|who) (?:is|are|can be|i can see))?(?: (?:clearly|fully|actually))?(?: {_SEEN})?"
    rf"(?: (?:in|within|of) {_IMAGE})?(?: (?:at all|in total|in all|altogether|overall|total|here))?"
)
_ALONE = re.compile(rf"{_TOTAL}(?: [.,;:!?)\u2013\u2014-].*)?")
"""Text after a noun that does not limit it to a part of the image."""
_LEAD = re.compile(rf"(?:(?:yes|no|well|overall|in total|in all|also|here|so|in {_IMAGE}|looking closely) (?:, )?)*")
"""Text before a claim about the whole image."""
_STARTS = re.compile(rf"{_LEAD.pattern}(?:only |just |exactly )?")
_EXACTLY = re.compile(r".*\b(?:only|just|exactly|precisely|a total of)")
_EXISTS = re.compile(
    r"(?:^|(?<= ))(?:there (?:is|are)|there's|there're|(?:i|we|you) (?:can )?(?:clearly )?(?:see|count|spot)|"
    rf"{_IMAGE} (?:clearly )?(?:shows|contains|has|features|includes|depicts)|a total of)"
    r"(?: (?:only|just|exactly|precisely|clearly|a total of|a)){0,2}$"
)
_EXISTS_LIST = re.compile(rf"{_EXISTS.pattern.removesuffix('$')} .*(?:and|,|with)")
_DEFINITE = re.compile(r"(?:^|.* )(?:the|these|those|all)")
_HAPPENS = re.compile(
    r" (?:is|are) (?:\w+ing|in|on|at|by|near|seated|visible|present|shown|gathered)\b.*| can be seen\b.*"
)
_SHOWN = re.compile(
    rf" (?:is|are|can be) (?:{_SEEN}(?: (?:in|within) {_IMAGE})?|(?:in|within) {_IMAGE})(?: [.,;:!?].*)?"
)
SUPPOSED = frozenset(
    words("if would could might should usually typically normally often generally imagine suppose unless per whether")
)
FURTHER = frozenset(words("another additional more other others third fourth fifth else plus besides also second"))
_VAGUE = frozenset(
    words(
        """about around approximately roughly nearly almost over under least most than between up perhaps maybe several
        many dozens hundreds or few some"""
    )
)
_PLAIN = frozenset(
    words(
        """black white brown grey gray red green blue yellow orange pink purple golden tan dark light big large small
        little tiny huge tall short long young old older younger adult"""
    )
)
_PLACES = frozenset(
    words(
        """on in at near behind beside under above below inside outside around between beneath along across next left
        right top bottom front back background foreground with wearing holding by from to for"""
    )
)
_PARTS = re.compile(rf" going on| (?:in|within|of|from) {_IMAGE}| in (?:great |more |full )?(?:detail|total|all|depth)")
_HOW_MANY = re.compile(
    r" (?:(?:are|is) (?:there|visible|shown|present|pictured|seen)|(?:can|do|could) (?:you|we) (?:see|count|spot)|"
    rf"can be (?:seen|counted)|does {_IMAGE} (?:show|have|contain|include)|(?:are|is)(?= in {_IMAGE})|appear)"
    rf"{_TOTAL} \?"
)
HOW_MANY_HERE = re.compile(r" (?:(?:are|is)|(?:can|do) (?:you|we) (?:see|count|spot))\b.*")
_ASKS_WHETHER = re.compile(
    r"(?:is|are) there|(?:do|can) you (?:see|spot|find|notice)|"
    rf"does {_IMAGE} (?:show|contain|include|feature|have)"
)
_DENIED = re.compile(
    r"(?:^|(?<= ))(?:there is(?= nobody)|there (?:is|are) (?:absolutely |clearly )?(?:no signs? of|no|not any|not an?|"
    r"not a single|not one|neither|an absence of|a lack of)(?: any)?|there's (?:no|not an?)|"
    r"there (?:isn't|aren't) (?:any|an?|a single)|(?:i|we|you) (?:can )?(?:see|spot) no|"
    r"(?:i|we|you) (?:do not|don't|cannot|can't|can not) (?:see|spot|find)(?: any| a single| an?)?|"
    rf"{_IMAGE} (?:does not|doesn't) (?:show|contain|include|feature|have|depict)(?: any| a single| an?)?|"
    rf"{_IMAGE} (?:shows|contains|has|includes|features) (?:no|neither|not a single)|{_IMAGE} lacks(?: any)?|"
    rf"{_IMAGE} is (?:without|(?:devoid|empty|free) of)(?: any)?) "
)
_NONE_SHOWN = re.compile(rf"(?:(?:no|not a single|not one|neither) (?=.)|(?=nobody))(?P<items>.+?){_SHOWN.pattern}$")
_ABSENT = re.compile(
    rf"(?P<items>.+?) (?:is|are) (?:absent|missing|nowhere (?:to be (?:seen|found)|in sight)|not {_SEEN})"
    rf"(?: (?:in|from|within) {_IMAGE})?(?: [.,;:!?].*)?"
)
_CLAUSE = re.compile(
    r" , (?:but|and|so|only|which|just|as|because|though|although)\b| (?:but|except|because) | [;:\u2013\u2014.!?(-]"
)
_SEPARATOR = re.compile(r" ,(?: (?:or|and|nor))? | (?:or|nor|and) ")
_SAYS_NO = re.compile(
    r"(?:no|nope|none|not (?:at all|a single one|one|any)|"
    r"there (?:are|is|'re) (?:none|not any)|there aren't any|(?:i|we) (?:do not|don't|cannot|can't) see (?:any|one)"
    r"(?=\W*$))\b"
    r"(?! doubt| of)"
)
Kind = Literal["exists", "starts", "definite"]
"""`There are two dogs`, `Two dogs are visible` and `the two dogs`; the last does not exclude further dogs."""


@dataclass(frozen=True, slots=True)
class StatedCount:
    """One count in a sentence, such as `there are two brown dogs in the image`.

    Attributes:
        number: The stated number.
        form: The noun as it is written.
        noun: The labels that it covers.
        kind: How the count is phrased.
        is_plain: Whether no adjective stands between number and noun.
        is_exact: Whether it is marked by `only`, `exactly`, `a single` or the like.
        lead: Text before the phrase.
        after: Text after the noun.
        place: Index of the number among the sentence's tokens.
    """

    number: int
    form: str
    noun: Noun
    kind: Kind
    is_plain: bool
    is_exact: bool
    lead: str
    after: str
    place: int


def wrong_count(known: Known, question: str, answer: str) -> str | None:
    """Find a count in a question or an answer that neither boxes nor captions support.

    Args:
        known: The context's counts.
        question: The question; empty if it does not limit the answer to a part of the image.
        answer: The answer.

    Returns:
        A description of the wrong count, or None.
    """
    if not known.boxes:
        return None
    question_tokens = tokens_of(question)
    if problem := wrong_total(known, question_tokens, answer):
        return problem
    is_limited = is_part(question_tokens)
    for text in (question, answer):
        tokens = tokens_of(text)
        for sentence in sentences_of(tokens):
            if SUPPOSED.intersection(sentence):
                continue
            for count in counts_of(known, sentence, is_description=not question):
                is_last = not FURTHER.intersection(sentence if count.is_exact else tokens)
                is_whole = not is_limited and is_last and text is answer
                if problem := check_count(known, count, is_whole):
                    return problem
    return None


def check_count(known: Known, count: StatedCount, is_whole: bool) -> str | None:
    """Describe a count that exceeds boxes and captions, or that is below the boxes if it is about the whole image."""
    noun, boxes = count.noun, known.count(count.noun)
    problem = f'"{count.number} {count.form}" but the boxes show {boxes}'
    if noun.relation != "wider" and count.number > known.most(noun):
        return problem
    if not is_whole or noun.relation == "narrower" or not count.is_plain or count.number >= boxes:
        return None
    is_total = (_SHOWN if count.kind == "starts" else _ALONE).fullmatch(count.after) and _LEAD.fullmatch(count.lead)
    return None if not is_total or count.kind == "definite" or count.number in known.stated(noun) else problem


def counts_of(known: Known, tokens: list[str], is_description: bool) -> Iterator[StatedCount]:
    """Yield the counts of a sentence that are about the image.

    In a description every number is about the image. In other answers only certain phrases are, since the rest may be
    about the world in general.
    """
    for place, token in enumerate(tokens):
        number = number_of(token) if token != "single" else 1
        if number is None:
            continue
        start = skip_adjectives(tokens, place + 1)
        found = noun_at(tokens, start, known.nouns)
        if found is None or not known.nouns[found[0]].countable:
            continue
        form, end = found
        if number != 1 and not known.nouns[form].plural:
            continue
        before, after = " ".join(tokens[:place]), "".join(f" {token}" for token in tokens[end:])
        kind: Kind
        if match := _EXISTS.search(before):
            kind, before = "exists", before[: match.start()]
        elif _DEFINITE.fullmatch(before):
            kind = "definite"
        elif _STARTS.fullmatch(f"{before} ".lstrip()) and _HAPPENS.match(after):
            kind, before = "starts", ""
        elif _EXISTS_LIST.fullmatch(before) or (
            is_description and not _VAGUE.intersection(tokens[max(0, place - 3) : place])
        ):
            kind = "definite"
        else:
            continue
        is_exact = _EXACTLY.fullmatch(" ".join(tokens[:place])) is not None or token == "single"
        yield StatedCount(number, form, known.nouns[form], kind, start == place + 1, is_exact, before, after, place)


def wrong_total(known: Known, question_tokens: list[str], answer: str) -> str | None:
    """Check the answer to `How many dogs are there?`, or to a yes-or-no question about a count."""
    text = " ".join(question_tokens)
    place = next(
        (i + 2 for i in range(len(question_tokens) - 1) if question_tokens[i : i + 2] == ["how", "many"]), None
    )
    if place is None or not question_tokens or SUPPOSED.intersection(question_tokens):
        return _wrong_more_than(known, text, answer)
    start = skip_adjectives(question_tokens, place)
    found = noun_at(question_tokens, start, known.nouns)
    if found is None or not known.nouns[found[0]].countable:
        return None
    noun, after = known.nouns[found[0]], "".join(f" {token}" for token in question_tokens[found[1] :])
    numbers = _answered_numbers(known, noun, answer)
    boxes, stated = known.count(noun), known.stated(noun)
    if not numbers or stated.intersection(numbers) or boxes in (*numbers, sum(numbers)) or sum(numbers) in stated:
        return None
    problem = f"{' and '.join(map(str, numbers))} {found[0]} but the boxes show {boxes}"
    if noun.relation != "wider" and min(numbers) > known.most(noun) and HOW_MANY_HERE.match(after):
        return problem
    is_whole = start == place and _HOW_MANY.match(after) is not None and noun.relation != "narrower"
    return problem if is_whole and (noun.relation == "same" or sum(numbers) < boxes) else None


def _wrong_more_than(known: Known, text: str, answer: str) -> str | None:
    """Check the answer to `Is there more than one dog?` or `Is there only one dog?`."""
    match = re.match(r"(?:is|are) there (?P<what>more than|only|just) (?P<number>\S+) (?P<rest>.*)", text)
    yes = re.match(r"(yes|no)\b", answer.strip().lower())
    number = number_of(match["number"]) if match else None
    if match is None or yes is None or number is None:
        return None
    tokens = match["rest"].split()
    found = noun_at(tokens, 0, known.nouns)
    if found is None or not _ALONE.fullmatch("".join(f" {token}" for token in tokens[found[1] :])):
        return None
    noun = known.nouns[found[0]]
    if noun.relation != "same" or not noun.countable or known.most(noun) != known.count(noun):
        return None
    boxes = known.count(noun)
    expected = boxes > number if match["what"] == "more than" else boxes <= number
    answered = yes[1] == "yes"
    return None if answered == expected else f'"{yes[1]}" to {match["what"]} {number} but the boxes show {boxes}'


def _answered_numbers(known: Known, noun: Noun, answer: str) -> list[int]:
    """Return the numbers in the answer's first sentence that may count the noun; none if its wording is vague."""
    tokens = next(sentences_of(tokens_of(answer)), [])
    if _VAGUE.intersection(tokens):
        return []
    numbers = []
    for place, token in enumerate(tokens):
        number = {"none": 0, "no": 0, "single": 1}.get(token, number_of(token))
        following = tokens[place + 1 : place + 2]
        # "One of them is black" counts a part, "there are three of them" counts all.
        is_limited = following == ["of"] and tokens[place - 2 : place] != ["there", "are"]
        if number is None or is_limited or [token, *following] in (["no", ","], ["single", "one"]):
            continue
        other = noun_at(tokens, skip_adjectives(tokens, place + 1), known.nouns)
        if other is None or set(known.nouns[other[0]].labels) & set(noun.labels):
            numbers.append(number)
    return numbers


def denied_object(known: Known, question: str, answer: str) -> str | None:
    """Find an object that the answer denies although it has a box.

    Args:
        known: The context's counts.
        question: The question; empty if it does not limit the answer to a part of the image.
        answer: The answer.

    Returns:
        A description of the wrong denial, or None.
    """
    question_tokens = tokens_of(question)
    if form := _answered_no(known, question_tokens, answer):
        return f'"no" to whether there is a {form} but the boxes show {known.count(known.nouns[form])}'
    is_limited = is_part(question_tokens) or any(
        noun_at(question_tokens, place, known.nouns) for place in range(len(question_tokens))
    )
    for sentence in sentences_of(tokens_of(answer)):
        for items, names_image in _denials(" ".join(sentence)):
            for form in _denied_nouns(known, items):
                if names_image or not is_limited:
                    return f'"no {form}" but the boxes show {known.count(known.nouns[form])}'
    return None


def _denials(sentence: str) -> Iterator[tuple[str, bool]]:
    """Yield the text after `there is no` and similar phrases, and whether the sentence names the image explicitly."""
    matches = [(match, sentence[match.end() :]) for match in _DENIED.finditer(sentence)]
    none = _NONE_SHOWN.match(sentence)
    absent = _ABSENT.fullmatch(sentence)
    for match, items in [*matches, *((found, found["items"]) for found in (none, absent) if found)]:
        lead = sentence[: match.start()]
        if _LEAD.fullmatch(lead):
            yield items, re.search(_IMAGE, sentence) is not None


def _denied_nouns(known: Known, items: str) -> list[str]:
    """Return the known nouns in a list of denied objects; none if the list is limited to a place."""
    clause = _CLAUSE.split(f" {items}", maxsplit=1)[0]
    clause = re.sub(rf"{_TOTAL}$", "", clause).strip()
    parts = [re.sub(r"^(?:any|an?|no|single) ", "", part) for part in _SEPARATOR.split(clause)]
    if _PLACES.intersection(parts[-1].split()) or parts[-1].endswith(("ing", "ed")):
        return []  # "no dogs or cats on the sofa" is about the sofa
    parts = ["person" if part in ("one", "nobody") else part for part in parts]
    return [part for part in parts if part in known.nouns and known.nouns[part].relation != "narrower"]


def _answered_no(known: Known, question_tokens: list[str], answer: str) -> str | None:
    """Return the noun of `Is there a dog?` if the answer is a plain no."""
    text = " ".join(question_tokens)
    match = _ASKS_WHETHER.match(text)
    if match is None or not _SAYS_NO.match(answer.strip().lower()):
        return None
    rest = re.sub(r"^ (?:any|an?|some|even one|even a|a single) ", " ", text[match.end() :]).split()
    found = noun_at(rest, 0, known.nouns)
    if found is None or known.nouns[found[0]].relation == "narrower":
        return None
    if not _ALONE.fullmatch("".join(f" {token}" for token in rest[found[1] :])):
        return None
    replied = " ".join(tokens_of(answer))
    is_corrected = re.match(r"no , there (?:is|are) (?!no\b|not\b|none\b)", replied)  # "No, there are two."
    return None if is_corrected else found[0]


def sentences_of(tokens: list[str]) -> Iterator[list[str]]:
    """Split tokens after `.`, `!` and `?`."""
    start = 0
    for place, token in enumerate(tokens):
        if token in (".", "!", "?"):
            yield tokens[start : place + 1]
            start = place + 1
    if start < len(tokens):
        yield tokens[start:]


def skip_adjectives(tokens: list[str], place: int) -> int:
    """Return the place after up to two plain adjectives."""
    for _ in range(2):
        place += place < len(tokens) and tokens[place] in _PLAIN
    return place


def is_part(question_tokens: list[str]) -> bool:
    """Check whether a question is about a part of the image, which then limits the answer too."""
    return bool(_PLACES.intersection(_PARTS.sub("", " ".join(question_tokens)).split()))
