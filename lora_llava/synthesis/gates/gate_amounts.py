"""Gate for amounts in other forms than one number: `a pair of`, `both`, `several`, ranges, sums, and `the number of`.

An amount is rewritten as a number, so that the rules of `gate_claims` decide whether the sentence counts the image's
objects. Amounts without an upper limit (`several`, `at least four`) are wrong only if there are fewer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lora_llava.synthesis.contexts.context import Context
from lora_llava.synthesis.gates.gate_claims import (
    HOW_MANY_HERE,
    SUPPOSED,
    check_count,
    counts_of,
    is_part,
    sentences_of,
    skip_adjectives,
    wrong_total,
)
from lora_llava.synthesis.gates.gate_nouns import Known, Noun, noun_at, number_of, tokens_of, words
from lora_llava.synthesis.gates.gate_sums import wrong_sum

_TENS = {
    word: 10 * value for value, word in enumerate(words("twenty thirty forty fifty sixty seventy eighty ninety"), 2)
}
_UNITS = words("one two three four five six seven eight nine")
_NUMBER = (
    rf"(?:\d{{1,4}}|(?:{'|'.join(_TENS)})(?:-(?:{'|'.join(_UNITS)}))?|(?:a|one) hundred|half a dozen|"
    r"(?:(?:a|one|two|three|four) )?dozen|zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|"
    r"fourteen|fifteen|sixteen|seventeen|eighteen|nineteen)"
)
_GROUPS = {"pair": 2, "duo": 2, "twosome": 2, "trio": 3, "threesome": 3, "quartet": 4, "quintet": 5}
_MANY = {"dozens": 13, "hundreds": 101, "scores": 21}
_SEVERAL = (
    r"a couple(?: of|(?= [.,!]))|several|(?:quite )?a few|numerous|multiple|various|plenty of|lots of|a lot of|"
    r"a (?:large )?number of|"
    r"an array of|a (?:small |large |big )?(?:group|bunch|handful|herd|flock|pack|row|line|collection|variety|pile) of|"
    r"many"
)
_AMOUNT = re.compile(
    rf"(?<![^ ])(?:between (?P<from>{_NUMBER}) and (?P<until>{_NUMBER})"
    rf"|(?P<low>{_NUMBER}) (?:to|or|\u2013|\u2014|-) (?P<high>{_NUMBER})"
    rf"|(?P<joined>\d{{1,4}}-\d{{1,4}}|(?:{'|'.join(_UNITS)})-(?:to-|or-)?(?:{'|'.join(_UNITS)}|ten))"
    rf"|(?P<more>at least|no fewer than|no less than|not less than|more than|over|upwards of) (?P<than>{_NUMBER})"
    rf"|(?P<least>{_NUMBER}) or more"
    rf"|(?P<many>{'|'.join(_MANY)}) (?:and {'|'.join(_MANY)} )?of"
    rf"|(?:a |the )?(?P<group>{'|'.join(_GROUPS)})(?: of(?: the)?)?"
    r"|(?:a |one )?(?P<lone>single|lone|sole|solitary)"
    rf"|(?P<several>{_SEVERAL})(?: of the)?"
    r"|(?P<both>both)(?: of)?(?: (?:the|these|those))?"
    rf"|(?P<twice>{_NUMBER}) \( ?{_NUMBER} ?\)"
    rf"|(?P<number>{_NUMBER}))(?= |$)"
)
_CROWD = 5
"""Boxes from which `more than five` is accepted for five: beyond it, boxes are often incomplete (untuned)."""
_NOT_COUNTED = re.compile(r"(?:^| )(?:how|so|as|too|not|n't|very|about|around|nearly|almost|up to|or|per) $")
_PLURAL_WORDS = frozenset(
    words("group crowd herd flock bunch row line team family couple audience pair others many several lots")
)
_NUMBER_OF = re.compile(
    r"(?:^| )(?:number|count|amount|quantity) of (?P<rest>(?:[a-z-]+ ){1,3}?)"
    r"(?:(?:visible|present|shown|seen) )?(?:(?:in|within) (?:the|this) (?:image|picture|photo|scene) )?"
    rf"(?:is|are|equals|:) (?:exactly |equal to )?(?P<count>{_NUMBER})(?= |$)"
)


@dataclass(frozen=True, slots=True)
class Amount:
    """An amount as it is written.

    Attributes:
        low: The smallest number that it allows.
        high: The largest; None if it has no limit.
        is_vague: Whether it names no number at all, such as `several`.
        text: The words.
    """

    low: int
    high: int | None
    is_vague: bool
    text: str


def wrong_amount(known: Known, context: Context, question: str, answer: str) -> str | None:
    """Find an amount in a question or an answer that boxes and captions contradict.

    Args:
        known: The context's counts.
        context: The context, whose captions may name several of a kind without a number.
        question: The question; empty if it does not limit the answer to a part of the image.
        answer: The answer.

    Returns:
        A description of the wrong amount, or None.
    """
    if not known.boxes:
        return None
    asked = tokens_of(question)
    if problem := _wrong_reply(known, context, asked, answer):
        return problem
    is_limited = is_part(asked)
    for text in (question, answer):
        for sentence in sentences_of(tokens_of(text)):
            if SUPPOSED.intersection(sentence):
                continue
            tokens, amounts = rewrite_amounts(sentence)
            is_whole = text is answer and not is_limited
            problem = _wrong_sentence(known, context, tokens, amounts, is_whole, is_description=not question)
            problem = problem or _wrong_number_of(known, tokens, is_whole)
            if problem := problem or (wrong_sum(known, tokens, is_whole) if text is answer else None):
                return problem
    return None


def rewrite_amounts(tokens: list[str]) -> tuple[list[str], dict[int, Amount]]:
    """Replace amounts by numbers in digits.

    Args:
        tokens: A sentence, from `tokens_of`.

    Returns:
        The sentence with the smallest number of each amount in its place, and the amounts by place. Plain numbers are
        replaced too, but are not amounts.
    """
    text = " ".join(tokens)
    found: list[str] = []
    amounts: dict[int, Amount] = {}
    end = 0
    for match in _AMOUNT.finditer(text):
        before, after = text[end : match.start()], text[match.end() :]
        amount = _read(match)
        if amount is None or (match["several"] and _NOT_COUNTED.search(text[: match.start()])):
            continue
        if match["both"] and re.match(r" (?:[a-z-]+ ){1,3}and\b", after):
            continue  # "both the dog and the cat" counts nothing
        found += before.split()
        if match["both"]:
            found.append("the")
        if not (match["number"] and number_of(match["number"]) is not None):
            amounts[len(found)] = amount
        found.append(str(amount.low))
        end = match.end()
    return [*found, *text[end:].split()], amounts


def _read(match: re.Match[str]) -> Amount | None:
    """Return the amount of a match; None for a range whose limits are in the wrong order."""
    groups = {name: value for name, value in match.groupdict().items() if value}
    text = match[0]
    if several := groups.get("several"):
        return Amount(2, None, True, several)
    if many := groups.get("many"):
        return Amount(_MANY[many], None, True, text)
    if "lone" in groups:
        return Amount(1, 1, False, "a single")
    if "both" in groups:
        return Amount(2, 2, False, "both")
    if group := groups.get("group"):
        return Amount(_GROUPS[group], _GROUPS[group], False, text)
    if "more" in groups:
        least = value_of(groups["than"])
        return Amount(least + (groups["more"] in ("more than", "over", "upwards of")), None, False, text)
    if "least" in groups:
        return Amount(value_of(groups["least"]), None, False, text)
    limits = [groups[name] for name in ("from", "until", "low", "high") if name in groups]
    if joined := groups.get("joined"):
        limits = [part for part in joined.split("-") if part not in ("to", "or")]
    if limits:
        low, high = map(value_of, limits)
        return Amount(low, high, False, text) if low < high else None
    number = value_of(groups.get("twice") or groups["number"])
    return Amount(number, number, False, text)


def value_of(text: str) -> int:
    """Return the value of a number in digits or in words, such as `twenty-one`, `half a dozen` or `two dozen`."""
    if (number := number_of(text)) is not None:
        return number
    if text.endswith("dozen"):
        first = text.removesuffix("dozen").strip()
        return 6 if first.startswith("half") else 12 * (number_of(first) or 1)
    if text.endswith("hundred"):
        return 100
    tens, _, unit = text.partition("-")
    return _TENS[tens] + (number_of(unit) or 0)


def _wrong_sentence(
    known: Known,
    context: Context,
    tokens: list[str],
    amounts: dict[int, Amount],
    is_whole: bool,
    is_description: bool,
) -> str | None:
    """Check every amount of a sentence that counts the image's objects."""
    if not amounts:
        return None
    for count in counts_of(known, tokens, is_description):
        amount = amounts.get(count.place)
        if amount is None or count.noun.relation == "wider":
            continue
        problem = f'"{amount.text} {count.form}" but the boxes show {known.count(count.noun)}'
        if _exceeds(known, context, count.noun, amount):
            return problem
        is_total = amount.high is not None and amount.text != "both"
        if is_total and check_count(known, replace(count, number=amount.high or 0), is_whole):
            return problem
    return None


def _exceeds(known: Known, context: Context, noun: Noun, amount: Amount) -> bool:
    """Check whether boxes and captions show fewer than an amount needs."""
    most = known.most(noun)
    if noun.relation == "wider" or amount.low <= most + (amount.high is None and most >= _CROWD):
        return False
    return not (amount.is_vague and _is_plural_in_captions(known, context, noun))


def _is_plural_in_captions(known: Known, context: Context, noun: Noun) -> bool:
    """Check whether a caption names several of a kind, with a number or without."""
    named = {number for caption in known.captions for number, label in caption if not label or label in noun.labels}
    if any(number == -2 or number > 1 for number in named):
        return True
    return any(_PLURAL_WORDS.intersection(tokens_of(caption)) for caption in context.captions)


def _wrong_number_of(known: Known, tokens: list[str], is_whole: bool) -> str | None:
    """Check `the number of dogs is four`."""
    match = _NUMBER_OF.search(" ".join(tokens))
    if match is None:
        return None
    items = match["rest"].split()
    found = noun_at(items, start := skip_adjectives(items, 0), known.nouns)
    if found is None or found[1] != len(items) or not known.nouns[found[0]].countable:
        return None
    noun, number = known.nouns[found[0]], value_of(match["count"])
    exceeds = noun.relation != "wider" and number > known.most(noun)
    lacks = is_whole and not start and noun.relation != "narrower" and number < known.count(noun)
    if exceeds or (lacks and number not in known.stated(noun)):
        return f'"{number} {found[0]}" but the boxes show {known.count(noun)}'
    return None


def _wrong_reply(known: Known, context: Context, asked: list[str], answer: str) -> str | None:
    """Check the answer to `How many dogs are there?` if it is an amount."""
    place = next((i + 2 for i in range(len(asked) - 1) if asked[i : i + 2] == ["how", "many"]), None)
    first = next(sentences_of(tokens_of(answer)), [])
    tokens, amounts = rewrite_amounts(first)
    if place is None or not amounts:
        return None
    if all(amount.low == amount.high for amount in amounts.values()):
        return wrong_total(known, asked, " ".join(tokens))
    found = noun_at(asked, skip_adjectives(asked, place), known.nouns)
    amount = next(_leading(tokens, amounts), None)
    if found is None or amount is None or not known.nouns[found[0]].countable or SUPPOSED.intersection(asked):
        return None
    if not HOW_MANY_HERE.match("".join(f" {token}" for token in asked[found[1] :])):
        return None
    if _exceeds(known, context, known.nouns[found[0]], amount):
        return f'"{amount.text}" {found[0]} but the boxes show {known.count(known.nouns[found[0]])}'
    return None


def _leading(tokens: list[str], amounts: dict[int, Amount]) -> Iterator[Amount]:
    """Yield the amount that an answer begins with, also after `there are` and the like."""
    for place, amount in amounts.items():
        if re.fullmatch(r"(?:there (?:is|are)|i (?:can )?see|you can see|we can see)?", " ".join(tokens[:place])):
            yield amount
