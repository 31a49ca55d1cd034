"""Measure the encoding of rows like LLaVA-Instruct's: conversations per second, and the time of a second start."""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import LlamaTokenizer

from lora_llava.data.conversation import read_turns
from lora_llava.data.encode import encode_conversation, encode_spans
from lora_llava.data.encoded import encode_table
from lora_llava.data.sources import open_source
from lora_llava.data.templates.named_templates import get_template
from lora_llava.data.templates.spans import conversation_spans
from lora_llava.demo.build import build_tokenizer

_SYLLABLES = "ba con di ed fer ing lo man ne or pre qua re st ter un ver wi ou th en al is"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=158_000)
    parser.add_argument("--tokenizer", help="folder of a Llama tokenizer; default: the demo's small one")


def run(args: argparse.Namespace) -> dict[str, Any]:
    tokenizer = LlamaTokenizer.from_pretrained(args.tokenizer) if args.tokenizer else build_tokenizer(0)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        file = folder / "rows.json"
        _write(file, args.rows)
        rows = list(itertools.islice(json.loads(file.read_text()), 4_000))
        one = _timed(lambda: [_one(row["conversations"], tokenizer) for row in rows])
        many = _timed(lambda: _many(rows, tokenizer))
        table: list[Any] = []

        def start() -> None:
            source = open_source(file)
            table.append(encode_table(source, tokenizer=tokenizer, template="vicuna_v1", cache=folder))

        first, second = _timed(start), _timed(start)
    return {
        "rows": args.rows,
        "tokenizer": "Llama's" if args.tokenizer else "the demo's",
        "tokens_per_row_without_image": round(len(table[0].ids) / args.rows, 1),
        "rows_per_second_one_at_a_time_one_core": round(len(rows) / one),
        "rows_per_second_in_batches_one_core": round(len(rows) / many),
        "first_start_seconds_all_cores": round(first, 1),
        "second_start_seconds": round(second, 2),
    }


def _one(messages: Any, tokenizer: Any) -> None:
    encode_conversation(messages, tokenizer=tokenizer, template="vicuna_v1", num_image_tokens=576)


def _many(rows: list[Any], tokenizer: Any) -> None:
    """Encode as `encode_table` does, on one core (TOKENIZERS_PARALLELISM is off)."""
    template = get_template("vicuna_v1")
    for start in range(0, len(rows), 512):
        batch = rows[start : start + 512]
        encode_spans([conversation_spans(read_turns(row["conversations"]), template) for row in batch], tokenizer)


def _timed(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _write(file: Path, count: int) -> None:
    """Write rows like LLaVA-Instruct-158K's: 37% conversations of 3 to 5 turns, 15% descriptions, 48% reasoning."""
    rng = random.Random(0)
    syllables = _SYLLABLES.split()
    words = ["".join(rng.choices(syllables, k=rng.choice((1, 1, 2, 2, 3)))) for _ in range(20_000)]
    weights = [1 / (rank + 10) for rank in range(len(words))]
    pool = rng.choices(words, weights, k=200_000)

    def sentence(low: int, high: int) -> str:
        start = rng.randrange(len(pool) - high)
        return " ".join(pool[start : start + rng.randint(low, high)]).capitalize() + "."

    with file.open("w") as stream:
        stream.write("[")
        for index in range(count):
            kind = rng.random()
            if kind < 0.37:
                texts = [sentence(8, 45) if i % 2 else sentence(6, 12) for i in range(2 * rng.randint(3, 5))]
            else:
                texts = [sentence(8, 16), sentence(70, 130) if kind < 0.52 else sentence(60, 140)]
            texts[0] = f"<image>\n{texts[0]}" if rng.random() < 0.5 else f"{texts[0]}\n<image>"
            turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
            row = {"id": f"{index:012d}", "image": f"{index:012d}.jpg", "conversations": turns}
            stream.write((",\n" if index else "\n") + json.dumps(row))
        stream.write("\n]\n")
