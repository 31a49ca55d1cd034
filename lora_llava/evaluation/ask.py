"""Asking a model the questions of a ScienceQA split."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from lora_llava.data.conversation import Conversation
from lora_llava.data.encode import encode_prompt
from lora_llava.data.images import Pictures
from lora_llava.data.templates import Template
from lora_llava.evaluation.scienceqa import Prediction, Table, make_prediction, score
from lora_llava.inference.generate import Question, generate_answers


def choose_rows(rows: Sequence[Conversation], count: int | str, seed: int) -> list[Conversation]:
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
    """Give every row with a picture another row's: a model that looks must lose by it.

    Args:
        rows: Rows of which some have pictures.
        seed: Draws the exchange.

    Returns:
        The rows, no picture where it was.
    """
    places = [i for i, row in enumerate(rows) if row.images]
    random.Random(seed).shuffle(places)
    shuffled = list(rows)
    for place, source in zip(places, places[1:] + places[:1], strict=True):
        shuffled[place] = replace(rows[place], images=rows[source].images)
    return shuffled


def ask_scienceqa(
    model: Any,
    rows: Sequence[Conversation],
    pictures: Pictures,
    *,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    num_image_tokens: int,
    batch_size: int,
    max_new_tokens: int,
    predictions: Path,
    description: str,
) -> Table:
    """Ask every question, write the answers as JSONL and score them.

    Args:
        model: What answers.
        rows: Conversations of ScienceQA.
        pictures: Gives their pictures.
        tokenizer: The processor's.
        template: The one that was trained.
        num_image_tokens: Of one picture.
        batch_size: Questions at once.
        max_new_tokens: Longest answer.
        predictions: File for one `Prediction` a line, in the rows' order.
        description: Stands before the progress bar.

    Returns:
        The table.
    """
    questions = []
    for row in rows:
        messages = [{"role": turn.role, "content": turn.text} for turn in row.turns[:-1]]
        ids = encode_prompt(messages, tokenizer=tokenizer, template=template, num_image_tokens=num_image_tokens)
        questions.append(Question(ids, row.images))
    answers: dict[int, Prediction] = {}
    found = generate_answers(
        model, questions, tokenizer=tokenizer, pictures=pictures, batch_size=batch_size,
        max_new_tokens=max_new_tokens, stop_string=template.stop_string,
    )  # fmt: skip
    for index, text in tqdm(found, total=len(rows), desc=description, unit="question", dynamic_ncols=True):
        answers[index] = make_prediction(rows[index].row_id, text, rows[index].extra)
    ordered = [answers[index] for index in range(len(rows))]
    write_predictions(predictions, ordered)
    return score(ordered)


def write_predictions(file: Path, predictions: Sequence[Prediction]) -> None:
    """Write predictions, one JSON object a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions]
    file.write_text("".join(lines), encoding="utf-8")
