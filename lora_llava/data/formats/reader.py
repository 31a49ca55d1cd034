"""Read a row of any format into a conversation.

Harmless faults are fixed and noted on the conversation. Other faults raise a `RowError`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_llava.data.conversation import (
    IMAGE_PLACEHOLDER,
    Conversation,
    EncodingError,
    ImagePosition,
    Turn,
    place_image,
    read_turns,
)
from lora_llava.data.formats.images import likely_image_column, row_images
from lora_llava.data.formats.registry import CHAT_COLUMNS, Format, match_format
from lora_llava.data.formats.shared import Columns, RowError, listed

PLACEHOLDER_ADDED = "placeholder added"
LEADING_ANSWER_CUT = "leading answer cut"
OPEN_QUESTION_CUT = "unanswered end cut"
IMAGE_NOT_READ = "image column not read: "
"""Start of the note on a row without images in which a column that is not read names some; the column follows."""
_TYPE_COLUMNS = ("question_type", "category")
"""Columns that may name the type of question; the first that a row has counts."""


def read_row(
    row: Any,
    number: int,
    *,
    form: Format = "conversations",
    columns: Columns | None = None,
    position: ImagePosition = "first",
    seed: int = 0,
    embedded: bool = False,
) -> Conversation:
    """Read one row into a conversation.

    Args:
        row: The row as the file holds it.
        number: The row's index in the file, from 0: its name if it has no id, and part of the seed of its coin.
        form: The value of `data.format`; `captions` also accepts an image with its bare caption.
        columns: The table's columns.
        position: Where a row's single image goes in the text. `as_written` keeps its place, and puts an image that
            the text does not mention first.
        seed: Seeds the coin of `random` and the draw of the request that a bare caption answers.
        embedded: Whether the images are in the table itself; they are named by the row's number.

    Returns:
        The conversation: turns in order, one placeholder per image. Its `extra` holds `choices` (a list, or a text
        with `|` between them) and `type` (`question_type` or `category`) if the row has them.

    Raises:
        RowError: If the row cannot be read as a conversation.
    """
    columns = columns or Columns()
    if not isinstance(row, Mapping):
        raise RowError("malformed row", f"the row is {type(row).__name__}; a row has id, image and conversations")
    row = {key: value for key, value in row.items() if value is not None and value == value}  # NaN != NaN
    rng = random.Random(f"{seed} {number}")
    found, match = match_format(row, form, columns)
    messages = found.messages(row, match, columns, rng)
    images = row_images(row, messages, columns, number if embedded else None)
    try:
        turns = read_turns(messages, len(images), inline=found.is_chat or form == "captions")
    except EncodingError as error:
        raise RowError(error.kind, str(error)) from None
    conversation = Conversation(str(row.get(columns.id, number)), turns, images, _extra(row))
    # Only chats are expected to hold placeholders; a table's question without one is not noted.
    placed = _place(_fix(conversation), position, rng, expected=found.is_chat)
    likely = None if images else likely_image_column(row, {*vars(columns).values(), "images", *CHAT_COLUMNS})
    return placed if likely is None else replace(placed, notes=(*placed.notes, f"{IMAGE_NOT_READ}{likely}"))


def extra_columns(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the columns of a row that an evaluation uses beside question and answer."""
    kind = next((name for name in _TYPE_COLUMNS if name in row), None)
    return ((kind,) if kind else ()) + (("choices",) if "choices" in _extra(row) else ())


def _extra(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an evaluation may use: the choices of the last question, and the type of question."""
    try:
        choices = listed(row.get("choices"), "choices")
    except RowError:  # a text that only looks like a list
        choices = row.get("choices")
    if isinstance(choices, str):  # a table's cell
        choices = [choice.strip() for choice in choices.split("|")]
    found: dict[str, Any] = {}
    if isinstance(choices, (list, tuple)) and len(choices) > 1 and all(isinstance(x, str) and x for x in choices):
        found["choices"] = list(choices)
    kind = next((row[name] for name in _TYPE_COLUMNS if name in row), None)
    return found | ({"type": kind} if isinstance(kind, str) and kind else {})


def _fix(conversation: Conversation) -> Conversation:
    """Cut an answer before the first question and a question after the last answer, as LLaVA does
    (llava/train/train.py, preprocess_v1, "Skip the first one if it is not from human").

    Raises:
        RowError: If the rest is not a conversation.
    """
    turns, notes = list(conversation.turns), []
    system = turns[:1] if turns and turns[0].role == "system" else []
    turns = turns[len(system) :]
    if not turns:
        raise RowError("empty conversation", "the conversation is empty; give a question and an answer")
    roles = {turn.role for turn in turns}
    for role, what in (("user", "question"), ("assistant", "answer")):
        if role not in roles:
            raise RowError("one-sided conversation", f"the conversation has no {what}; add one")
    cut: list[Turn] = []
    if turns[0].role == "assistant":
        cut, turns, notes = turns[:1], turns[1:], [LEADING_ANSWER_CUT]
    if turns[-1].role == "user":
        cut, turns, notes = [*cut, turns[-1]], turns[:-1], [*notes, OPEN_QUESTION_CUT]
    _check_order(turns)
    if any(IMAGE_PLACEHOLDER in turn.text for turn in (*system, *cut)):
        raise RowError(
            "placeholder count",
            f"{IMAGE_PLACEHOLDER} is in a turn that is not trained on; move it to a question with an answer",
        )
    return replace(conversation, turns=(*system, *turns), notes=tuple(notes))


def _check_order(turns: Sequence[Turn]) -> None:
    if not turns:
        raise RowError("one-sided conversation", "no question of the conversation is answered; add an answer")
    for index, turn in enumerate(turns):
        expected = ("user", "assistant")[index % 2]
        if turn.role != expected:
            raise RowError("role order", f"turn {index} is the {turn.role}'s; it should be the {expected}'s")
        if not turn.text.strip():
            what = "answer" if turn.role == "assistant" else "question"
            raise RowError(f"empty {what}", f"turn {index}: the {what} is empty")


def _place(conversation: Conversation, position: ImagePosition, rng: random.Random, *, expected: bool) -> Conversation:
    """Make the number of placeholders equal to the number of images, and move a single one to `position`.

    Args:
        conversation: The conversation.
        position: See `read_row`.
        rng: Throws the coin of `random`.
        expected: Whether to note placeholders that had to be added.

    Raises:
        RowError: If the text has placeholders, but not as many as the row has images.
    """
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
