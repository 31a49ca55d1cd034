"""Lenient parser of the letter in an answer, an alternative to LLaVA's `parse_answer`.

LLaVA's rule accepts only a lone capital, "B. iron", and "The answer is B.". This parser also accepts `b`, `(B)`, `B)`,
`**B**`, "answer: B", "Option B is correct", "B because ...", and the text of a choice. It never guesses: it returns no
choice if an answer names two, or if the letter may be a word ("A cat is shown"). It ignores "not B" and choices that
are only mentioned.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from lora_llava.evaluation.parsing.normal import answer_tokens, plain_text

_LETTER = r"(?P<letter>[a-e])"
_OPEN, _CLOSE = r"[(\[{\"']*", r"[)\]}\"']*"
_NAME = r"(?:(?:option|choice|letter)\s+)?"
_ENDS = rf"{_CLOSE}(?=\s*(?:$|[.,;:!?)\n]|(?:because|since|due|as)\b))"
"""What may follow a letter that is not a word: the end, punctuation, or a reason."""
_IS = r"(?:\s*[:=]\s*|\s+(?:is|would\s+be|must\s+be|should\s+be)\s*:?\s+|\s+is:\s*)"
_THE_ANSWER = rf"\b(?:answer|option|choice|letter)[\"']?{_IS}"
_LONE = re.compile(rf"(?:(?:option|choice|letter|answer)\s+)?[^\w\s]*\s*{_LETTER}\s*[^\w\s]*")
_LEADING = re.compile(rf"{_NAME}[(\[]?{_LETTER}(?:[)\]][.:]?|[.:])(?P<rest>\s+.*)", re.DOTALL)
_REASONED = re.compile(rf"{_NAME}{_OPEN}{_LETTER}{_CLOSE},?\s+(?:because|since|due|as)\b.*", re.DOTALL)
_DECLARED = (
    re.compile(rf"{_THE_ANSWER}{_NAME}{_OPEN}{_LETTER}{_ENDS}"),
    re.compile(rf"\b(?:choose|pick|select|go\s+with)\s+{_NAME}{_OPEN}{_LETTER}{_ENDS}"),
    re.compile(rf"(?:^|[.!?\n]\s*)(?:it\s+is|it's)\s+{_NAME}{_OPEN}{_LETTER}{_ENDS}"),
    re.compile(rf"(?:^|(?<=[\s(\[])){_NAME}{_OPEN}{_LETTER}{_CLOSE}\s+is\s+(?:the\s+)?(?:correct|right|best)\b"),
    re.compile(rf"\\boxed\s*{{\s*(?:\\text\s*{{\s*)?{_OPEN}{_LETTER}{_CLOSE}\s*}}"),
)
_DECLARED_TEXT = re.compile(rf"{_THE_ANSWER}(?P<text>[^\n]+)")
_DECLARED_WITH_TEXT = re.compile(rf"{_THE_ANSWER}{_NAME}[(\[]?{_LETTER}(?:[)\]][.:]?|[.:])\s+(?P<text>[^\n]+)")
_MARKED = re.compile(
    r"(?<![\w'])\(?(?P<letter>[A-E])(?:\)|[.:](?=\s+\w))|(?:\bor|\band|[/&,])\s*\(?(?P<other>[A-E])(?=\s*(?:$|[).,;:!?]))"
)
"""Further choices after the first: `(C)`, `C)`, `or C.`"""
_OTHER = re.compile(
    rf"{_CLOSE}\s*(?:,|;|/|&|\bor\b|\band\b)\s*(?:(?:option|choice)\s+)?[(\[\"']*[a-e](?=\W*(?:$|[\s]))", re.IGNORECASE
)
_NEGATED = re.compile(r"\b(?:not|isn't|never|nor|neither)\s*$")
_MARKS = str.maketrans("", "", "*_`~#$")
_LETTERS = "abcde"


def parse_leniently(text: str, num_choices: int, choices: Sequence[str] = ()) -> int:
    """Find the choice that an answer names, in the usual forms of models and people.

    Args:
        text: The answer of the model.
        num_choices: Number of choices of the question.
        choices: Texts of the choices; without them only letters are parsed.

    Returns:
        Index of the choice, or -1 if the text names none, several, or one beyond the choices.
    """
    shown = text.translate(_MARKS).strip()
    plain = plain_text(shown).strip()
    found = {index for index in _named(shown, plain, choices) if index is not None}
    return found.pop() if len(found) == 1 and max(found) < num_choices else -1


def _named(shown: str, plain: str, choices: Sequence[str]) -> Iterator[int | None]:
    """Yield every choice that an answer names in any form; an index beyond all letters if it contradicts itself."""
    yield _choice_of(plain, choices)
    if lone := _LONE.fullmatch(plain):
        yield _LETTERS.index(lone["letter"])
        return
    declared = list(_declared(plain, choices))
    yield from declared
    leading = _LEADING.fullmatch(plain)
    if leading and not _is_article(leading, plain):
        letter = _LETTERS.index(leading["letter"])
        yield letter
        yield _choice_of(leading["rest"], choices)
        if not declared and _choice_of(leading["rest"], choices) != letter:
            yield from _marked(shown)
    elif reasoned := _REASONED.fullmatch(plain):
        yield _LETTERS.index(reasoned["letter"])
        yield from _marked(shown)


def _marked(shown: str) -> Iterator[int]:
    """Return the letters of an answer that are written like a choice, such as `(C)`."""
    return (_LETTERS.index((match["letter"] or match["other"]).lower()) for match in _MARKED.finditer(shown))


def _declared(plain: str, choices: Sequence[str]) -> Iterator[int | None]:
    """Yield the choices that a text declares as its answer."""
    for pattern in _DECLARED:
        for match in pattern.finditer(plain):
            if _NEGATED.search(plain[: match.start()]):
                continue
            yield _LETTERS.index(match["letter"])
            if _OTHER.match(plain, match.end()):
                yield len(_LETTERS)
    for match in _DECLARED_WITH_TEXT.finditer(plain):
        letter, named = _LETTERS.index(match["letter"]), _choice_of(match["text"], choices)
        yield letter
        yield named
    for match in _DECLARED_TEXT.finditer(plain):
        declared = match["text"]
        first = re.split(r"(?<=[.!?])\s", declared)[0]
        named = _choice_of(declared, choices)
        yield _choice_of(first, choices) if named is None else named
        spaced = re.fullmatch(rf"[(\[]?{_LETTER}[)\]]?\s+(?P<text>.+)", first)
        known = _choice_of(spaced["text"], choices) if spaced else None
        if spaced and known is not None and spaced["letter"] == _LETTERS[known]:  # "answer: B iron"
            yield known


def _choice_of(text: str, choices: Sequence[str]) -> int | None:
    """Return the index of the only choice with this text."""
    exact = [i for i, choice in enumerate(choices) if plain_text(choice).strip() == text.lstrip().rstrip(" .\n")]
    if len(exact) == 1:
        return exact[0]
    tokens = answer_tokens(text)
    same = [i for i, choice in enumerate(choices) if tokens and answer_tokens(choice) == tokens]
    return same[0] if len(same) == 1 else None


def _is_article(leading: re.Match[str], plain: str) -> bool:
    """Check whether a leading "a." belongs to an abbreviation such as "a. m."."""
    return bool(re.match(r"[a-e]\.\s+[a-z]\.", plain))
