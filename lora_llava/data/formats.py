"""Rows as people have them, brought to conversations: LLaVA's JSON, ShareGPT, messages, tables, captions.

A row's form is seen by its keys. What is harmless is mended and noted on the conversation; what is not is a `RowError`
with a kind, under which such rows are counted.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lora_llava.data.conversation import (
    IMAGE_PLACEHOLDER,
    Conversation,
    EncodingError,
    ImagePosition,
    Turn,
    place_image,
    read_turns,
)
from lora_llava.data.files.json_stream import keys_once

Format = Literal["conversations", "captions"]
BRIEF_REQUESTS = (
    "Describe the image concisely.",
    "Provide a brief description of the given image.",
    "Offer a succinct explanation of the picture presented.",
    "Summarize the visual content of the image.",
    "Give a short and clear explanation of the subsequent image.",
    "Share a concise interpretation of the image provided.",
    "Present a compact description of the photo's key features.",
    "Relay a brief, clear account of the picture shown.",
    "Render a clear and concise summary of the photo.",
    "Write a terse but informative summary of the picture.",
    "Create a compact narrative representing the image presented.",
)
"""What a naively expanded caption answers (LLaVA, arXiv 2304.08485, section 4.2 and appendix, table 11)."""
_LONGEST_NAME = 4096
_PYTHON_NAMES = re.compile(r"\[\s*(?:'[^'\\]*'[\s,]*)*\]")
"""A list of texts as pandas writes it into a CSV, from Python's lists and from NumPy's arrays."""
CHAT_COLUMNS = ("conversations", "conversation", "messages")
PLACEHOLDER_ADDED = "placeholder added"
LEADING_ANSWER_CUT = "leading answer cut"
OPEN_QUESTION_CUT = "unanswered end cut"
IMAGE_NOT_READ = "image column not read: "
"""Begins the note on a row without images in which a column that is not read names some; the column follows."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
IMAGE_COLUMNS = ("image", "images", "image_path", "image_paths", "image_file", "image_name", "img", "img_path",
                 "picture", "pictures", "photo", "file_name", "filename", "file", "path")  # fmt: skip
"""What people call the column of images, the likeliest first."""
_SURE_COLUMNS = IMAGE_COLUMNS[:-4]
"""Those that name an image whatever they hold; a file or a path may be something else."""


class RowError(EncodingError):
    """A row that is no conversation; `kind` is its reason in a word or two."""

    row_id = name = ""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message, kind)


@dataclass(frozen=True)
class Columns:
    """What a table calls its columns.

    Attributes:
        image: The image's file name, or the image itself.
        question: The user's text.
        answer: The text that is trained.
        caption: The image's caption, in captions.
        id: The row's name.
    """

    image: str = "image"
    question: str = "question"
    answer: str = "answer"
    caption: str = "caption"
    id: str = "id"


def read_row(
    row: Any, number: int, *, form: Format = "conversations", columns: Columns | None = None,
    position: ImagePosition = "first", seed: int = 0, embedded: bool = False,
) -> Conversation:  # fmt: skip
    """Bring one row to a conversation.

    Args:
        row: What the file holds.
        number: Its place in the file, from 0; its name where it has no id, and what its coin is thrown by.
        form: `conversations`, or `captions`, which also takes an image with its bare caption.
        columns: What a table calls its columns.
        position: Where a row's one image goes in the text; `as_written` leaves it, and puts one that the text does
            not mention first.
        seed: Throws the coin of `random` and draws the request that a bare caption answers.
        embedded: Images are in the table itself, and named by the row's number.

    Returns:
        The conversation: turns in order, one placeholder per image; in `extra` its `choices` (a list, or a text with
        `|` between them) and its `type` (`question_type` or `category`), where it has them.

    Raises:
        RowError: For a row that is none.
    """
    columns = columns or Columns()
    if not isinstance(row, Mapping):
        raise RowError("malformed row", f"the row is {type(row).__name__}; a row holds id, image and conversations")
    row = {key: value for key, value in row.items() if value is not None and value == value}  # NaN is not itself
    rng = random.Random(f"{seed} {number}")
    messages = _messages(row, form, columns, rng)
    images = _images(row, messages, columns, number if embedded else None)
    is_chat = any(row.get(key, "") != "" for key in CHAT_COLUMNS)
    try:
        turns = read_turns(messages, len(images), inline=is_chat or form == "captions")
    except EncodingError as error:
        raise RowError(error.kind, str(error)) from None
    conversation = Conversation(str(row.get(columns.id, number)), turns, images, _asides(row))
    # A table's text has no place for a placeholder: that there is none is nothing to note.
    placed = _place(_mend(conversation), position, rng, expected=is_chat)
    likely = None if images else likely_image_column(row, {*vars(columns).values(), "images", *CHAT_COLUMNS})
    return placed if likely is None else replace(placed, notes=(*placed.notes, f"{IMAGE_NOT_READ}{likely}"))


def likely_image_column(row: Mapping[str, Any], known: Container[str]) -> str | None:
    """The column of a row that evidently names images, by its values' suffixes or by its own name.

    Args:
        row: What the file holds.
        known: Columns that are something else, or read already.

    Returns:
        The likeliest column; None where there is none.
    """
    others = {str(name): value for name, value in row.items() if name not in known}
    by_name = sorted(
        (name for name in others if _plain(name) in IMAGE_COLUMNS), key=lambda name: IMAGE_COLUMNS.index(_plain(name))
    )
    for name in dict.fromkeys([*by_name, *others]):
        if _names_images(others[name], _plain(name) in _SURE_COLUMNS):
            return name
    return None


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_").replace(" ", "_")


def _names_images(value: Any, sure: bool) -> bool:
    """Whether a value is the name of an image file, an image stored in the table, or a list of them."""
    if isinstance(value, Mapping):
        return "path" in value and set(value) <= {"path", "bytes"}
    if isinstance(value, (list, tuple)):
        return bool(value) and all(_names_images(each, sure) for each in value)
    if not isinstance(value, str) or not value.strip() or len(value) > _LONGEST_NAME:
        return False
    try:
        found = listed(value, "")
    except RowError:
        return False
    if not isinstance(found, str):
        return _names_images(found, sure)
    name = value.strip()
    return "\n" not in name and (sure or name.lower().endswith(IMAGE_SUFFIXES))


def _messages(row: dict[str, Any], form: Format, columns: Columns, rng: random.Random) -> list[Any]:
    """The row's messages, whichever form it has."""
    forms: list[str] = [key for key in CHAT_COLUMNS if row.get(key, "") != ""]  # a table's cell may be empty
    if columns.question in row and columns.answer in row:
        forms.append(f"{columns.question}/{columns.answer}")
    if len(forms) > 1:
        raise RowError("both formats", f"the row has {' and '.join(forms)}, which are two forms; keep one")
    if form == "captions" and not forms:
        if columns.caption not in row:
            raise RowError("missing column", _missing(row, f"{columns.caption} or conversations"))
        request = {"from": "human", "value": f"{IMAGE_PLACEHOLDER}\n{rng.choice(BRIEF_REQUESTS)}"}
        return [request, {"from": "gpt", "value": _text(row, columns.caption)}]
    if not forms:
        lacking = [name for name in (columns.question, columns.answer) if name not in row]
        both = f"conversations, messages, or {columns.question} and {columns.answer}"
        wanted = lacking[0] if len(lacking) == 1 else both
        raise RowError("missing column", _missing(row, wanted))
    if forms[0] not in CHAT_COLUMNS:
        asked, answered = _text(row, columns.question), _text(row, columns.answer)
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    messages = listed(row[forms[0]], forms[0])
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise RowError("malformed row", f"{forms[0]} is {messages!r:.60}; a row holds id, image and conversations")
    system = row.get("system")
    if isinstance(system, str) and system:  # ShareGPT as LLaMA-Factory writes it
        return [{"role": "system", "content": system}, *messages]
    return list(messages)


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def listed(value: Any, column: str) -> Any:
    """A value as it is, or the list that a text holds, as a cell of a CSV or Parquet file may.

    Raises:
        RowError: For a text in square brackets that is no list.
    """
    if not isinstance(value, str):
        return value
    text = value.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return value
    try:
        return json.loads(text, object_pairs_hook=keys_once)
    except (ValueError, RecursionError):
        if _PYTHON_NAMES.fullmatch(text):
            return re.findall(r"'([^']*)'", text)
    raise RowError("malformed row", f'{column} is {value!r:.60}, which is no JSON list; write it as ["a", "b"]')


def _asides(row: Mapping[str, Any]) -> dict[str, Any]:
    """What an evaluation can use of a row besides: the choices its last question has, and its kind of question."""
    try:
        choices = listed(row.get("choices"), "choices")
    except RowError:  # a text that only looks like a list
        choices = row.get("choices")
    if isinstance(choices, str):  # a table's cell
        choices = [choice.strip() for choice in choices.split("|")]
    found: dict[str, Any] = {}
    if isinstance(choices, (list, tuple)) and len(choices) > 1 and all(isinstance(x, str) and x for x in choices):
        found["choices"] = list(choices)
    kind = row.get("question_type", row.get("category"))
    return found | ({"type": kind} if isinstance(kind, str) and kind else {})


def _missing(row: Mapping[str, Any], wanted: str) -> str:
    return f"it lacks {wanted}; it has {', '.join(map(repr, row)) or 'nothing'}; columns are named by data.columns"


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if isinstance(value, (str, int, float)):  # a number is a fair answer
        return str(value)
    raise RowError("malformed row", f"{column} is {value!r:.60}; it should be text")


def _images(row: Mapping[str, Any], messages: Sequence[Any], columns: Columns, number: int | None) -> tuple[str, ...]:
    """Names of the row's images: from its column, else from the parts of its messages; images in the table itself
    are named by the row's number."""
    given: list[Any] = []
    for column in dict.fromkeys((columns.image, "images")):
        value = listed(row.get(column, []), column)
        given += value if isinstance(value, (list, tuple)) else [value] if not _is_blank(value) else []
    inline = [name for message in messages for name in _inline_names(message)]
    if given and inline:
        raise RowError("both formats", f"its images stand in {columns.image} and in its messages; keep one")
    names = []
    for place, value in enumerate(given or inline):
        name = value.get("path") if isinstance(value, Mapping) else value
        name = name.strip() if isinstance(name, str) else name
        if number is not None:
            name = str(number) if len(given) == 1 else f"{number}:{place}"
        if not isinstance(name, str) or not name or "\0" in name:
            raise RowError("malformed row", f"an image's name is {value!r:.60}; it should be a file's name")
        names.append(name)
    return tuple(names)


def _inline_names(message: Any) -> list[Any]:
    """Images that image parts name: `image`, `path` or `url` as transformers takes them, `image_url` as OpenAI."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, Sequence) or isinstance(content, str):
        return []
    found = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") not in ("image", "image_url"):
            continue
        url = part.get("image_url")
        nested = url.get("url") if isinstance(url, Mapping) else url
        found.append(next((v for v in (part.get("image"), part.get("path"), part.get("url"), nested) if v), None))
    return [name for name in found if name is not None]


def _mend(conversation: Conversation) -> Conversation:
    """Cut what stands before the first question and after the last answer, as LLaVA does (llava/train/train.py,
    preprocess_v1, "Skip the first one if it is not from human"), and refuse what is no conversation."""
    turns, notes = list(conversation.turns), []
    system = turns[:1] if turns and turns[0].role == "system" else []
    turns = turns[len(system) :]
    if not turns:
        raise RowError("empty conversation", "the conversation is empty; give a question and an answer")
    said = {turn.role for turn in turns}
    for role, what in (("user", "question"), ("assistant", "answer")):
        if role not in said:
            raise RowError("one-sided conversation", f"the conversation has no {what}; only the {turns[0].role} speaks")
    cut: list[Turn] = []
    if turns[0].role == "assistant":
        cut, turns, notes = turns[:1], turns[1:], [LEADING_ANSWER_CUT]
    if turns[-1].role == "user":
        cut, turns, notes = [*cut, turns[-1]], turns[:-1], [*notes, OPEN_QUESTION_CUT]
    _check_order(turns)
    if any(IMAGE_PLACEHOLDER in turn.text for turn in (*system, *cut)):
        raise RowError(
            "placeholder count", f"{IMAGE_PLACEHOLDER} stands in a turn that is not asked; show it with a question"
        )
    return replace(conversation, turns=(*system, *turns), notes=tuple(notes))


def _check_order(turns: Sequence[Turn]) -> None:
    if not turns:
        raise RowError("one-sided conversation", "the conversation has no question that is answered")
    for index, turn in enumerate(turns):
        expected = ("user", "assistant")[index % 2]
        if turn.role != expected:
            raise RowError("role order", f"turn {index} is the {turn.role}'s; the {expected}'s was due")
        if not turn.text.strip():
            what = "answer" if turn.role == "assistant" else "question"
            raise RowError(f"empty {what}", f"turn {index}: the {what} is empty")


def _place(
    conversation: Conversation, position: ImagePosition, rng: random.Random, *, expected: bool
) -> Conversation:  # fmt: skip
    """Make placeholders as many as images, and put a lone one where the recipe wants it; where one was `expected`, it
    is noted that it was not there."""
    images, turns = conversation.images, conversation.turns
    count = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
    if count not in (0, len(images)) or (count and not images):
        raise RowError(
            "placeholder count",
            f"{count} {IMAGE_PLACEHOLDER} placeholders for {len(images)} images; make them equal",
        )
    if not images:
        return conversation
    users = (i for i, turn in enumerate(turns) if turn.role == "user")
    place = next(i for i in users if not count or IMAGE_PLACEHOLDER in turns[i].text)
    text = turns[place].text
    if not count and expected:
        conversation = replace(conversation, notes=(*conversation.notes, PLACEHOLDER_ADDED))
    if len(images) == 1 and position != "as_written":
        rest = text.replace(IMAGE_PLACEHOLDER, "").strip()
        text = place_image(rest, position, rng) if rest else IMAGE_PLACEHOLDER
    elif not count:
        text = "\n".join([IMAGE_PLACEHOLDER] * len(images) + [text])
    turn = Turn("user", text)
    return replace(conversation, turns=(*turns[:place], turn, *turns[place + 1 :]))
