"""Parser of the teacher's answers: the requested JSON, and other forms that models write instead."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any, Literal

from lora_llava.data.conversation import Turn
from lora_llava.synthesis.sample import Flavour, Rejection, Turns

Role = Literal["user", "assistant"]
Message = tuple[Role, str]

_ROLES: dict[str, Role] = dict.fromkeys(("question", "q", "user", "human", "asker", "person"), "user")
_ROLES |= dict.fromkeys(("answer", "a", "assistant", "gpt", "response", "reply", "bot"), "assistant")
_SPEAKER_ROLES: dict[str, Role] = {**_ROLES, "model": "assistant", "ai": "assistant"}
_SPEAKERS = ("role", "from", "speaker")
_CONTENTS = ("content", "value", "text", "message")
_WRAPPERS = (
    "turns",
    "conversation",
    "conversations",
    "messages",
    "dialogue",
    "dialog",
    "qa",
    "qapairs",
    "pairs",
    "data",
    "sample",
    "result",
    "output",
)
_DESCRIPTIONS = ("description", "detaileddescription", "text", "content", "output", "answer", "response", "detail")
_OPENED = re.compile(r"<(think|thinking|thought|reasoning)>", re.IGNORECASE)
_CLOSED = re.compile(r"</(think|thinking|thought|reasoning)>", re.IGNORECASE)
_JSON = re.compile(r"[{\[]\s*(?:[\"{\[\]}]|\Z)")
_MARK = re.compile(
    r"^[ \t>*_#-]*+(?:\d{1,3}[.)][ \t]*+)?[*_]*+"
    r"(?P<name>question|answer|user|assistant|human|gpt|q|a)[ \t]*+#?\d{0,3}[ \t]*+[*_]*+[ \t]*+"
    r"[:\uff1a][ \t]*[*_]*[ \t]*"
    r"|(?<=\s)(?P<inline>(?-i:Question|Answer))[ \t]*+\d{0,3}:[ \t]*",
    re.IGNORECASE | re.MULTILINE,
)
"""Matches `Question:`, `**Q1:**`, `2. Answer 2:`. Possessive quantifiers keep the matching time linear."""
_RULE = re.compile(r"^[ \t]*(?:={3,}|-{3,}|\*{3,}|`{3,}\w*)[ \t]*$", re.MULTILINE)
_PREFACE = re.compile(
    r"\A(?:[^\n]{0,200}\b(?:description|here is|here's|sure|certainly)\b[^\n]{0,100}:[ \t]*\n\s*|"
    r"[*_# \t]{0,9}(?:detailed )?description[*_ \t]{0,9}(?::[*_ \t]*|\n\s*))",
    re.IGNORECASE,
)
"""Matches `Here is a description of the image:` and `**Description:**`."""
_ENDED = re.compile(r"[^\w\s,;:(\[{\u2013\u2014-]['\"\u201d\u2019)\]*_]*\Z")
_LONG = 12
"""Words from which a text without JSON must end like a sentence (untuned); a short answer need not."""


class CutTurns(tuple[Turn, ...]):
    """The whole turns of an answer whose JSON ends in the middle; the unfinished turn is left out."""


def parse_sample(text: str, flavour: Flavour, request: str | None = None, min_turns: int = 2) -> Turns | Rejection:
    """Parse an answer of the teacher.

    Accepted forms: the JSON of `RESPONSE_SCHEMAS`, also in Markdown code fences, surrounded by prose or after thoughts
    in `<think>`; a bare list of turns; other key names (user and assistant, human and gpt, role and content); lines of
    `Question:` and `Answer:` as in LLaVA's own prompts; and plain prose for `detail`.

    Args:
        text: Any text.
        flavour: Kind of sample that was requested.
        request: For `detail`, the question that the description becomes the answer to.
        min_turns: For `conversation`, the fewest whole questions with answers for which JSON that ends in the middle is
            accepted, as `CutTurns`; other flavours need their one.

    Returns:
        The turns, or a rejection as `unreadable`, `cut off`, `empty` or `turn order`. Nothing is raised.
    """
    written = _without_thoughts(text.replace("\r\n", "\n").replace("\r", "\n"))
    if written is None:
        return Rejection("cut off", "it ends within its thoughts")
    if not written.strip():
        return Rejection("empty", "the answer is empty")
    start, mark = _JSON.search(written), _MARK.search(written)
    if start and not (mark and written[mark.end() : start.start()].strip()):
        value = _read_json(written, start.start())
        if isinstance(value, Rejection):
            fewest = max(min_turns, 1) if flavour == "conversation" else 1
            return (
                value.reason == "cut off" and _whole_turns(written, start.start(), flavour, request, fewest)
            ) or value
        return _described(_description(value), request) if flavour == "detail" else _in_order(_messages(value))
    if flavour == "detail" and not mark:
        return _described(_prose(written), request)
    messages = list(_marked(written))
    if flavour == "detail":
        answers = [text for role, text in messages if role == "assistant"]
        return _described(_complete(answers[0]) if len(answers) == 1 else None, request)
    if not messages:
        return Rejection("unreadable", f"it is neither JSON nor questions and answers: {_excerpt(written)}")
    if messages[-1][0] == "user" or isinstance(last := _complete(messages[-1][1]), Rejection):
        return Rejection("cut off", f"it ends with {_excerpt(messages[-1][1][-60:])}")
    return _in_order([*messages[:-1], ("assistant", last)])


def _without_thoughts(text: str) -> str | None:
    """Remove `<think>` blocks outside JSON; return None if the text consists of a block without an end."""
    while (opened := _OPENED.search(text)) and not _JSON.search(text, 0, opened.start()):
        closed = _CLOSED.search(text, opened.end())
        if closed is None:
            return text if text[: opened.start()].strip() else None
        text = text[: opened.start()] + text[closed.end() :]
    # Some chat templates put the opening tag into the prompt, so that the answer has only the closing tag.
    closed = None if opened else _CLOSED.search(text)
    return text[closed.end() :] if closed else text


def _read_json(text: str, start: int) -> Any:
    """Read the JSON value that begins at `start`, or a list of several in a row; return a Rejection if it is broken."""
    decoder = json.JSONDecoder(strict=False, object_pairs_hook=_object)
    values: list[Any] = []
    match: re.Match[str] | None = _JSON.search(text, start)
    while match:
        try:
            value, end = decoder.raw_decode(text, match.start())
        except (ValueError, RecursionError) as error:
            end_or_none = _end_of_json(text, match.start())
            if end_or_none is None:
                return Rejection("cut off", f"the JSON ends with {_excerpt(text.rstrip()[-60:])}")
            end = end_or_none
            try:
                value = decoder.decode(_COMMA.sub(r"\1", text[match.start() : end]))
            except (ValueError, RecursionError):
                return Rejection("unreadable", f"the JSON is invalid: {error}")
        values.append(value)
        match = _JSON.search(text, end)
    return values[0] if len(values) == 1 else values


_COMMA = re.compile(r'("(?:[^"\\]|\\.)*+")|,(?=\s*[}\]])', re.DOTALL)
"""Matches a string, which is kept, or a trailing comma."""


def _object(pairs: list[tuple[str, Any]]) -> Any:
    """Return a dict, or a list of one-key dicts if a key repeats (`question, answer, question, answer`)."""
    found = dict(pairs)
    return found if len(found) == len(pairs) else [{key: value} for key, value in pairs]


def _end_of_json(text: str, start: int) -> int | None:
    """Return the place after the bracket that closes the one at `start`; None if the text ends before it."""
    depth, place = 0, start
    for match in _BRACKET.finditer(text, start):
        place = match.end()
        if match[0][0] == '"':
            if len(match[0]) == 1 or not match[0].endswith('"'):
                return None
            continue
        depth += 1 if match[0] in "{[" else -1
        if depth == 0:
            return place
    return None


def _whole_turns(text: str, start: int, flavour: Flavour, request: str | None, fewest: int) -> CutTurns | None:
    """Read the whole turns of a JSON value that ends in the middle; None if fewer than `fewest` are left.

    The text is cut after each of its last strings and brackets in turn, and closed with the brackets that are open.
    """
    stack: list[str] = []
    places: deque[tuple[int, str]] = deque(maxlen=_LAST_PLACES)
    for match in _BRACKET.finditer(text, start):
        if match[0][0] == '"':
            if len(match[0]) == 1 or not match[0].endswith('"'):
                break
        elif match[0] in "{[":
            stack.append("}" if match[0] == "{" else "]")
            if len(stack) > _DEEPEST:
                return None
            continue
        elif not stack or stack.pop() != match[0]:
            return None
        places.append((match.end(), "".join(reversed(stack))))
    decoder = json.JSONDecoder(strict=False, object_pairs_hook=_object)
    for end, closing in reversed(places):
        try:
            value = decoder.decode(text[start:end] + closing)
        except (ValueError, RecursionError):
            continue
        if flavour == "detail":
            turns = _described(_description(value), request)
        else:
            messages = _messages(value) or []
            turns = _in_order(messages[: len(messages) - len(messages) % 2])
        if not isinstance(turns, Rejection):
            return CutTurns(turns) if len(turns) >= 2 * fewest else None
    return None


_DEEPEST = 10
_LAST_PLACES = 12
"""Places, counted from the end, where JSON that ends in the middle may be cut: a turn has at most ten."""
_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*+"?|[{}\[\]]', re.DOTALL)


def _messages(value: Any, depth: int = 0) -> list[Message] | None:
    """Return the questions and answers of a JSON value in order; None if it contains anything else."""
    if isinstance(value, list):
        found: list[Message] = []
        if len(value) == 2 and all(isinstance(each, str) for each in value):
            return [("user", value[0].strip()), ("assistant", value[1].strip())]
        for each in value:
            if depth > 4 or (messages := _messages(each, depth + 1)) is None:
                return None
            found += messages
        return found
    if not isinstance(value, dict):
        return None
    keys = {_plain(key): key for key in value}
    for name in _WRAPPERS:
        if name in keys and isinstance(value[keys[name]], (list, dict)) and value[keys[name]] and depth <= 4:
            return _messages(value[keys[name]], depth + 1)
    return _read_role(value, keys) or _read_pair(value, keys)


def _read_role(value: dict[str, Any], keys: dict[str, str]) -> list[Message] | None:
    """Read `{"role": "user", "content": "..."}` and variants."""
    speaker = next((value[keys[name]] for name in _SPEAKERS if name in keys), None)
    content = next((value[keys[name]] for name in _CONTENTS if name in keys), None)
    role = _SPEAKER_ROLES.get(_plain(speaker)) if isinstance(speaker, str) else None
    text = _text(content)
    return [(role, text)] if role and text is not None else None


def _read_pair(value: dict[str, Any], keys: dict[str, str]) -> list[Message] | None:
    """Read `{"question": "...", "answer": "..."}` and variants: numbered keys, or lists of questions and answers."""
    questions, answers = (value.get(keys.get(name, "")) for name in ("questions", "answers"))
    if isinstance(questions, list) and isinstance(answers, list):
        value = dict(enumerate(zip_longest(questions, answers)))  # type: ignore[arg-type]
        pairs = [(role, _text(text)) for pair in value.values() for role, text in zip(_BOTH, pair, strict=True)]
    else:
        pairs = [(role, _text(text)) for key, text in value.items() if (role := _ROLES.get(_plain(key)))]
    if len(pairs) == 2:
        pairs.sort(key=lambda pair: _BOTH.index(pair[0]))
    found = [(role, text) for role, text in pairs if text is not None]
    return found if found and len(found) == len(pairs) else None


_BOTH: tuple[Role, Role] = ("user", "assistant")


def _plain(key: str) -> str:
    """Reduce a key to its lower-case letters."""
    return re.sub(r"[\W\d_]+", "", key).lower()


def _text(value: Any) -> str | None:
    """Return the text of a string, a number, a typed part or a list of them; None for anything else."""
    if isinstance(value, dict) and value.get("type") == "text":
        value = value.get("text")
    if isinstance(value, list) and value:
        parts = [_text(each) for each in value if not isinstance(each, list)]
        return "\n".join(part for part in parts if part) if all(parts) and len(parts) == len(value) else None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return value.strip() if isinstance(value, str) else None


def _in_order(messages: list[Message] | None) -> Turns | Rejection:
    """Check that the roles alternate and return the turns."""
    if not messages:
        return Rejection("unreadable", "the JSON contains no questions and answers")
    for number, (role, _) in enumerate(messages, 1):
        if role != (expected := "user" if number % 2 else "assistant"):
            return Rejection("turn order", f"turn {number} is from the {role}; expected the {expected}")
    if len(messages) % 2:
        return Rejection("turn order", "the last question has no answer")
    return tuple(Turn(role, text) for role, text in messages)


def _described(description: str | Rejection | None, request: str | None) -> Turns | Rejection:
    """Return the turns of a description that answers a request."""
    if description is None:
        return Rejection("unreadable", "it contains no description, or several")
    if isinstance(description, Rejection):
        return description
    return (Turn("user", request or ""), Turn("assistant", description))


def _description(value: Any) -> str | None:
    """Return the one description in a JSON value; None if it has none or several."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, (str, list)) and (text := _text(value)) is not None:
        return text
    if isinstance(value, dict):
        keys = {_plain(key): key for key in value}
        for name in _DESCRIPTIONS:
            if name in keys and (text := _text(value[keys[name]])) is not None:
                return text
        if len(value) == 1 and (text := _text(next(iter(value.values())))) is not None:
            return text
    answers = [text for role, text in _messages(value) or [] if role == "assistant"]
    return answers[0] if len(answers) == 1 else None


def _prose(text: str) -> str | Rejection:
    """Return a description written as plain text, without rules and introductory lines."""
    text = _RULE.sub("", text).strip()
    text = _PREFACE.sub("", text, count=1).strip()
    return _complete(text)


def _complete(text: str) -> str | Rejection:
    """Return the text, or a rejection if it is long and does not end like a sentence."""
    if len(text.split()) >= _LONG and not _ENDED.search(text[-9:]):
        return Rejection("cut off", f"it ends with {_excerpt(text[-60:])}")
    return text


def _marked(text: str) -> Iterator[Message]:
    """Yield the texts after `Question:` and `Answer:`; text before the first is ignored."""
    marks = list(_MARK.finditer(text))
    for mark, following in zip_longest(marks, marks[1:]):
        content = text[mark.end() : following.start() if following else None]
        yield _ROLES[(mark["name"] or mark["inline"]).lower()], _RULE.sub("", content).strip()


def _excerpt(text: str) -> str:
    """Quote the start of a text on one line."""
    text = " ".join(text.split())
    return repr(text if len(text) <= 80 else f"{text[:80]}...")
