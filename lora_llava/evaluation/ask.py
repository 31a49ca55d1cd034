"""Asking a model the questions of a split."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from lora_llava.data.conversation import IMAGE_PLACEHOLDER, Conversation
from lora_llava.data.encode import encode_prompt
from lora_llava.data.files import json_text
from lora_llava.data.images import Pictures
from lora_llava.data.templates import Template
from lora_llava.evaluation.answers import AnsweredRow, AnswerTable, answer_table, mark_answer
from lora_llava.evaluation.scienceqa import Prediction, Table, make_prediction, score
from lora_llava.inference.generate import Question, generate_answers

Row = TypeVar("Row")
Marked = TypeVar("Marked")


def choose_rows(rows: Sequence[Row], count: int | str, seed: int) -> list[Row]:
    """A fixed random subset, in the old order.

    Args:
        rows: All rows.
        count: How many, or `all`.
        seed: Draws them.
    """
    if count == "all" or int(count) >= len(rows):
        return list(rows)
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), int(count)))]


def shuffle_images(rows: Sequence[Conversation], seed: int) -> list[Conversation]:
    """Give every row with pictures those of a row that has others: a model that looks must lose by it.

    Args:
        rows: Rows of which some have pictures; they are exchanged among rows with as many.
        seed: Draws the exchange.

    Returns:
        The rows; one keeps its own pictures only where more than half of those with as many have the same.
    """
    places = [i for i, row in enumerate(rows) if row.images]
    random.Random(seed).shuffle(places)
    shuffled = list(rows)
    for count in {len(rows[place].images) for place in places}:
        groups: dict[tuple[str, ...], list[int]] = {}
        for place in places:
            if len(rows[place].images) == count:
                groups.setdefault(rows[place].images, []).append(place)
        order = [place for group in groups.values() for place in group]
        step = max(map(len, groups.values()))  # so far on, no row of the same pictures is met
        for place, source in zip(order, order[step:] + order[:step], strict=True):
            shuffled[place] = replace(rows[place], images=rows[source].images)
    return shuffled


def ask_scienceqa(model: Any, rows: Sequence[Conversation], pictures: Pictures, **settings: Any) -> Table:
    """Ask ScienceQA's questions, write the answers as JSONL and score them.

    Args:
        model: What answers.
        rows: Conversations of ScienceQA.
        pictures: Gives their pictures.
        settings: As `ask_rows`.

    Returns:
        The table.
    """

    def mark(row: Conversation, text: str) -> Prediction:
        return make_prediction(row.row_id, text, row.extra)

    return score(ask_rows(model, rows, pictures, mark=mark, **settings))


def ask_conversations(model: Any, rows: Sequence[Conversation], pictures: Pictures, **settings: Any) -> AnswerTable:
    """Ask the last question of every conversation, write the answers as JSONL and mark them.

    Args:
        model: What answers.
        rows: Conversations, the source's name in `extra`.
        pictures: Gives their pictures.
        settings: As `ask_rows`.

    Returns:
        The table.
    """

    def mark(row: Conversation, text: str) -> AnsweredRow:
        question = row.turns[-2].text.replace(IMAGE_PLACEHOLDER, "").strip()
        return mark_answer(row.row_id, str(row.extra.get("source", "")), question, row.turns[-1].text, text)

    return answer_table(ask_rows(model, rows, pictures, mark=mark, **settings))


def ask_rows(
    model: Any,
    rows: Sequence[Conversation],
    pictures: Pictures,
    *,
    mark: Callable[[Conversation, str], Marked],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    num_image_tokens: int,
    batch_size: int,
    max_new_tokens: int,
    predictions: Path,
    description: str,
) -> list[Marked]:
    """Ask the last question of every row, the turns before it as history.

    Args:
        model: What answers.
        rows: Conversations.
        pictures: Gives their pictures.
        mark: Marks an answer.
        tokenizer: The processor's.
        template: The one that was trained.
        num_image_tokens: Of one picture.
        batch_size: Questions at once.
        max_new_tokens: Longest answer.
        predictions: File for one marked answer a line, in the rows' order.
        description: Stands before the progress bar.

    Returns:
        The marked answers, in the rows' order.
    """
    questions = []
    for row in rows:
        messages = [{"role": turn.role, "content": turn.text} for turn in row.turns[:-1]]
        ids = encode_prompt(messages, tokenizer=tokenizer, template=template, num_image_tokens=num_image_tokens)
        questions.append(Question(ids, row.images))
    answers: dict[int, Marked] = {}
    found = generate_answers(
        model, questions, tokenizer=tokenizer, pictures=pictures, batch_size=batch_size,
        max_new_tokens=max_new_tokens, stop_string=template.stop_string,
    )  # fmt: skip
    for index, text in tqdm(found, total=len(rows), desc=description, unit="question", dynamic_ncols=True):
        answers[index] = mark(rows[index], text)
    ordered = [answers[index] for index in range(len(rows))]
    write_predictions(predictions, ordered)
    return ordered


def write_predictions(file: Path, predictions: Sequence[Any]) -> None:
    """Write predictions, one JSON object a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json_text(prediction) + "\n" for prediction in predictions]
    file.write_text("".join(lines), encoding="utf-8")
