"""Open a judge's stored answers, those that earlier versions wrote as JSON Lines included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_llava.core.errors import UserError
from lora_llava.inference.client.answer_store import ANSWERED, AnswerStore
from lora_llava.inference.client.budget import Charge
from lora_llava.inference.client.chat_request import ChatAnswer

LEDGER = "llava_bench_judge.sqlite"
OLD_LEDGER = "llava_bench_judge.jsonl"


def open_judge_ledger(folder: Path) -> AnswerStore:
    """Open the answers of a judge.

    Args:
        folder: Created if missing. A `llava_bench_judge.jsonl` in it is copied into a new store and left in place.

    Raises:
        UserError: If another run uses the store, or a line of the old file is not an answer.
    """
    store = AnswerStore(folder / LEDGER, sync=True)
    try:
        file = folder / OLD_LEDGER
        if file.is_file() and store.is_empty():
            with store.transaction():
                _copy(file, store)
    except BaseException:
        store.close()
        raise
    return store


def _copy(file: Path, store: AnswerStore) -> None:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.endswith(b"\n"):  # cut off when the process was killed
                return
            try:
                _add_row(json.loads(line), store)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{file}, line {number}: not an answer of a judge; remove the line") from None


def _add_row(row: dict[str, Any], store: AnswerStore) -> None:
    key, usd = row["key"], row.get("usd")
    usd = None if usd is None else float(usd)
    charge = Charge(int(row["prompt_tokens"]), int(row["completion_tokens"]), usd)
    if row.get("capped"):
        store.add_charge(key, row.get("failed", ANSWERED), charge, capped=True)
    if "failed" in row:
        return
    answer = ChatAnswer(row["text"], charge.prompt_tokens, charge.completion_tokens, row["model"])
    question = f"{row.get('question_id', '')} {row.get('order', '')}".strip()
    store.add(key, question, int(row.get("attempt", 0)), "", answer, usd, "", "")
