"""Words and numbers of an answer, as exact match and F1 compare them.

Words follow SQuAD's rule (arXiv 1606.05250, section 6.1; its `evaluate-v1.1.py`): lower case, no punctuation, no
articles, single spaces. That rule turns both 3.5 and -35 into 35 and knows only ASCII, so numbers and other scripts
have further rules:

- Text is compared after Unicode NFKC and case folding. Curly quotes and dashes equal straight ones, invisible
  characters are left out, and digits of any script are digits.
- Numbers are compared by value: 3.0 is 3, 1,000 is 1000, 007 is 7, 1e3 is 1000. A minus sign at the start of a number
  is part of it. Thousands are grouped by commas, apostrophes, underscores or narrow spaces, in threes.
- Characters between digits are part of the answer: the ratios 1:2 and 3/4, 9:30, 2020-01-05, 10^2. The first part of a
  date or a time may have a leading zero.
- A unit may be joined to its number: 35cm is 35 cm. Percent and currency signs are punctuation, as in SQuAD.
- Chinese, Japanese and Korean are compared by characters, without the spaces between them, as in MLQA (arXiv
  1910.07475) and KorQuAD (arXiv 1909.07005).
"""

from __future__ import annotations

import re
import unicodedata

CJK = (
    "\u1100-\u11ff\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3031-\u3035\u3038-\u303b\u3041-\u3096\u309d-\u309f"
    "\u30a1-\u30fa\u30fc-\u30ff\u3105-\u312f\u3131-\u318e\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\ua960-\ua97f\uac00-\ud7fb\uf900-\ufaff\U00020000-\U0003fffd"
)
"""Letters of Chinese, Japanese and Korean, for the character class of a regular expression."""
_ARTICLES = {"a", "an", "the"}
_ASCII_SYMBOLS = "$+<=>^`|~"
"""Characters that are punctuation for SQuAD but not for Unicode."""
_DASHES = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"), "-")
_QUOTES = dict.fromkeys(map(ord, "\u2018\u2019\u201a\u201b\u02bc\u2032\u00b4"), "'") | dict.fromkeys(
    map(ord, "\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb"), '"'
)
_PLAIN = _DASHES | _QUOTES | {ord("\u2044"): "/", ord("\u2215"): "/", ord("\u2236"): ":"}
_SUPERSCRIPTS = "\u2070\u00b9\u00b2\u00b3\u2074-\u2079"
_POWER = re.compile(rf"(?<=\d)(?=[\u207a\u207b]?[{_SUPERSCRIPTS}])")
_FRACTION = re.compile(r"(?<=\d)(?=[\u00bc-\u00be\u2150-\u215e\u2189])")
_NARROW = re.compile(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))")
_DIGITS = r"(?:[1-9]\d{0,2}(?:(?P<sep>[,'_])\d{3})(?:(?P=sep)\d{3})*(?!\d)|\d+)"
_VALUE = rf"(?:{_DIGITS}(?:\.\d+)?|\.\d+)(?:e[-+]?\d+(?![\w.]))?"
_JOINED = r"(?:[-:./^*\u00d7\u00f7=+~]|\^-)"
_ONE = re.compile(rf"[-+]?{_VALUE}")
_COMPOUND = re.compile(rf"[-+]?\d+(?:\.\d+)?(?:{_JOINED}\d+(?:\.\d+)?)+")
_START = re.compile(r"[-+]?\.?\d")
_WORD = re.compile(rf"[{CJK}]|[^\s{CJK}]+")
_UNIT = re.compile(r"[^\W\d_]*(?!\w)")
_POWERS = 40
"""Most digits that an exponent moves the point by; numbers beyond are compared as they are written."""


def answer_tokens(text: str) -> list[str]:
    """Split an answer into the tokens that are compared.

    Args:
        text: The answer of a model or a person.

    Returns:
        Words, normalised numbers, and characters of Chinese, Japanese and Korean. An answer that consists of articles,
        such as the choice A, keeps them.
    """
    found = [token for piece in _WORD.findall(plain_text(text)) for token in _tokens_of(piece)]
    return [token for token in found if token not in _ARTICLES] or found


def normalise(text: str) -> str:
    """Return the tokens of an answer with single spaces; see the module for the rule."""
    return re.sub(rf"(?<=[{CJK}]) (?=[{CJK}])", "", " ".join(answer_tokens(text)))


def plain_text(text: str) -> str:
    """Return NFKC text in folded case, with straight quotes and dashes, ASCII digits and no invisible characters."""
    text = _NARROW.sub("_", _FRACTION.sub(" ", _POWER.sub("^", text.translate(_QUOTES))))
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).translate(_PLAIN)
    return "".join(
        str(unicodedata.decimal(character)) if character.isdecimal() else character
        for character in folded
        if unicodedata.category(character) != "Cf"
    )


def is_number(token: str) -> bool:
    """Check whether a token of `answer_tokens` is a number, a ratio, a date or a time."""
    return bool(_START.match(token)) and not any(map(str.isalpha, token))


def _tokens_of(piece: str) -> list[str]:
    """Return the words and numbers of a piece of text without spaces."""
    tokens: list[str] = []
    place, word = 0, ""
    while place < len(piece):
        before = piece[place - 1] if place else ""
        found = None if before.isalnum() else _number_at(piece, place)
        if found and word.endswith("-") and word[-2:-1].isalpha() and found[0].isdecimal():  # F-16 is F16, as in SQuAD
            found = None
        if found is None:
            word += piece[place]
            place += 1
            continue
        tokens += _word(word)
        word = ""
        tokens.append(found[0])
        place = found[1]
        unit = _UNIT.match(piece, place)
        if unit and unit[0]:  # "cm" of 35cm
            tokens += _word(unit[0])
            place = unit.end()
    return tokens + _word(word)


def _number_at(piece: str, place: int) -> tuple[str, int] | None:
    """Return the normalised number that starts here and its end; None if no number starts here."""
    if not _START.match(piece, place):
        return None
    one, joined = _ONE.match(piece, place), _COMPOUND.match(piece, place)
    found = joined if joined and one and joined.end() > one.end() else one
    if found is None:
        return None
    rest = _UNIT.match(piece, found.end())
    if rest is None:  # 3d4, 0x1f: names with digits in them
        return None
    return (_one_form(found[0]) if found is one else _compound_form(found[0])), found.end()


def _one_form(text: str) -> str:
    """Return a number without separators, redundant zeros and plus sign."""
    digits, _, exponent = re.sub(r"[,'_+](?=[\d.])", "", text.replace("e+", "e")).partition("e")
    sign, digits = ("-", digits[1:]) if digits.startswith("-") else ("", digits)
    integer, _, part = digits.partition(".")
    if exponent:
        shift = int(exponent) if len(exponent) < 4 else _POWERS + 1
        if abs(shift) > _POWERS:
            return text
        integer, part = integer + part[: max(shift, 0)].ljust(max(shift, 0), "0"), part[max(shift, 0) :]
        if shift < 0:
            integer = integer.rjust(1 - shift, "0")
            integer, part = integer[:shift], integer[shift:] + part
    integer, part = integer.lstrip("0") or "0", part.rstrip("0")
    found = f"{integer}.{part}" if part else integer
    return found if found == "0" else sign + found


def _compound_form(text: str) -> str:
    """Return joined numbers without leading zeros, except after a colon, as in the minutes of a time."""
    return re.sub(r"(?<![\d:.])0+(?=\d)", "", text.removeprefix("+"))


def _word(text: str) -> list[str]:
    """Return a word without punctuation, split where its removal would join digits."""
    parts = re.split(r"(?<=\d)[^\w\s]+(?=\d)", text)
    kept = ["".join(c for c in part if not _is_punctuation(c)) for part in parts]
    return [part for part in kept if part]


def _is_punctuation(character: str) -> bool:
    category = unicodedata.category(character)
    return character in _ASCII_SYMBOLS or category.startswith("P") or category == "Sc"
