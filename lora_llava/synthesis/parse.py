"""A sample in what the teacher wrote: the JSON that was asked for, or the forms that models write in its place."""

from __future__ import annotations

import json
import re
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
_SAID = ("content", "value", "text", "message")
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
"""`Question:`, `**Q1:**`, `2. Answer 2:`; the repeats give nothing back, so that no text takes long."""
_RULE = re.compile(r"^[ \t]*(?:={3,}|-{3,}|\*{3,}|`{3,}\w*)[ \t]*$", re.MULTILINE)
_PREFACE = re.compile(
    r"\A(?:[^\n]{0,200}\b(?:description|here is|here's|sure|certainly)\b[^\n]{0,100}:[ \t]*\n\s*|"
    r"[*_# \t]{0,9}(?:detailed )?description[*_ \t]{0,9}(?::[*_ \t]*|\n\s*))",
    re.IGNORECASE,
)
"""`Here is a description of the image:` and `**Description:**`."""
_ENDED = re.compile(r"[^\w\s,;:(\[{\u2013\u2014-]['\"\u201d\u2019)\]*_]*\Z")
_LONG = 12
"""Words from which a text without JSON has to end as a sentence does (untuned): a short answer may do without."""


def parse_sample(text: str, flavour: Flavour, request: str | None = None) -> Turns | Rejection:
    """Read what the teacher wrote.

    Besides the JSON of `RESPONSE_SCHEMAS`, also in Markdown's fences, with prose around it or after thoughts in
    `<think>`, it takes a bare list of turns, other names of the keys (user and assistant, human and gpt, role and
    content), lines of `Question:` and `Answer:` as LLaVA's own prompts have them, and for `detail` plain prose.

    Args:
        text: Any text.
        flavour: What was asked for.
        request: Of `detail`, the question that the description is made the answer of.

    Returns:
        The turns, or `unreadable`, `cut off` or `turn order` with what it was. Nothing is raised.
    """
    written = _without_thoughts(text.replace("\r\n", "\n").replace("\r", "\n"))
    if written is None:
        return Rejection("cut off", "it ends in the middle of its thoughts")
    if not written.strip():
        return Rejection("empty", "nothing is written")
    start, mark = _JSON.search(written), _MARK.search(written)
    if start and not (mark and written[mark.end() : start.start()].strip()):
        value = _read_json(written, start.start())
        if isinstance(value, Rejection):
            return value
        return _described(_description(value), request) if flavour == "detail" else _in_order(_messages(value))
    if flavour == "detail" and not mark:
        return _described(_prose(written), request)
    messages = list(_marked(written))
    if flavour == "detail":
        answers = [text for role, text in messages if role == "assistant"]
        return _described(_complete(answers[0]) if len(answers) == 1 else None, request)
    if not messages:
        return Rejection("unreadable", f"neither JSON nor questions and answers: {_excerpt(written)}")
    if messages[-1][0] == "user" or isinstance(last := _complete(messages[-1][1]), Rejection):
        return Rejection("cut off", f"it ends with {_excerpt(messages[-1][1][-60:])}")
    return _in_order([*messages[:-1], ("assistant", last)])


def _without_thoughts(text: str) -> str | None:
    """The text after `<think>` and its like; None where the thoughts have no end. What JSON has of it stays."""
    while (opened := _OPENED.search(text)) and not _JSON.search(text, 0, opened.start()):
        closed = _CLOSED.search(text, opened.end())
        if closed is None:
            return text if text[: opened.start()].strip() else None
        text = text[: opened.start()] + text[closed.end() :]
    # Some chat templates open the thoughts in the prompt, so that only their end is written.
    closed = None if opened else _CLOSED.search(text)
    return text[closed.end() :] if closed else text


def _read_json(text: str, start: int) -> Any:
    """The value that begins at a place, or the list of several in a row; a Rejection where it cannot be read."""
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
                return Rejection("unreadable", f"the JSON is wrong: {error}")
        values.append(value)
        match = _JSON.search(text, end)
    return values[0] if len(values) == 1 else values


_COMMA = re.compile(r'("(?:[^"\\]|\\.)*+")|,(?=\s*[}\]])', re.DOTALL)
"""A string, to be passed over, or the comma after a last element."""


def _object(pairs: list[tuple[str, Any]]) -> Any:
    """A dict; where a key comes again (`question, answer, question, answer`), a list of dicts with a key each."""
    found = dict(pairs)
    return found if len(found) == len(pairs) else [{key: value} for key, value in pairs]


def _end_of_json(text: str, start: int) -> int | None:
    """Where the brackets that open at a place are closed again; None where the text ends before."""
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


_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*+"?|[{}\[\]]', re.DOTALL)


def _messages(value: Any, depth: int = 0) -> list[Message] | None:
    """Questions and answers in a JSON value, in its order; None where it holds something else."""
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
    return _spoken(value, keys) or _paired(value, keys)


def _spoken(value: dict[str, Any], keys: dict[str, str]) -> list[Message] | None:
    """`{"role": "user", "content": "..."}` and its like."""
    speaker = next((value[keys[name]] for name in _SPEAKERS if name in keys), None)
    said = next((value[keys[name]] for name in _SAID if name in keys), None)
    role = _SPEAKER_ROLES.get(_plain(speaker)) if isinstance(speaker, str) else None
    text = _text(said)
    return [(role, text)] if role and text is not None else None


def _paired(value: dict[str, Any], keys: dict[str, str]) -> list[Message] | None:
    """`{"question": "...", "answer": "..."}` and its like, also numbered, and lists of both."""
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
    return re.sub(r"[\W\d_]+", "", key).lower()


def _text(value: Any) -> str | None:
    if isinstance(value, dict) and value.get("type") == "text":
        value = value.get("text")
    if isinstance(value, list) and value:
        parts = [_text(each) for each in value if not isinstance(each, list)]
        return "\n".join(part for part in parts if part) if all(parts) and len(parts) == len(value) else None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return value.strip() if isinstance(value, str) else None


def _in_order(messages: list[Message] | None) -> Turns | Rejection:
    if not messages:
        return Rejection("unreadable", "the JSON holds no questions and answers")
    for number, (role, _) in enumerate(messages, 1):
        if role != (due := "user" if number % 2 else "assistant"):
            return Rejection("turn order", f"turn {number} is the {role}'s; the {due}'s was due")
    if len(messages) % 2:
        return Rejection("turn order", "the last question has no answer")
    return tuple(Turn(role, text) for role, text in messages)


def _described(description: str | Rejection | None, request: str | None) -> Turns | Rejection:
    if description is None:
        return Rejection("unreadable", "it holds no description, or several")
    if isinstance(description, Rejection):
        return description
    return (Turn("user", request or ""), Turn("assistant", description))


def _description(value: Any) -> str | None:
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
    text = _RULE.sub("", text).strip()
    text = _PREFACE.sub("", text, count=1).strip()
    return _complete(text)


def _complete(text: str) -> str | Rejection:
    """The text, unless it is long and ends without the end of a sentence."""
    if len(text.split()) >= _LONG and not _ENDED.search(text[-9:]):
        return Rejection("cut off", f"it ends with {_excerpt(text[-60:])}")
    return text


def _marked(text: str) -> Iterator[Message]:
    """Parts after `Question:` and `Answer:`; what stands before the first is no part."""
    marks = list(_MARK.finditer(text))
    for mark, following in zip_longest(marks, marks[1:]):
        said = text[mark.end() : following.start() if following else None]
        yield _ROLES[(mark["name"] or mark["inline"]).lower()], _RULE.sub("", said).strip()


def _excerpt(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 80 else f"{text[:80]}...")
