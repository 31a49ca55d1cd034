"""Speed beside TRL's own way and LLaMA-Factory: one random model and the same rows, one or several to an image."""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lora_llava.benchmark.benchmark_rows import DrawnImages, draw_rows, shape_config
from lora_llava.benchmark.benchmark_sides import BenchmarkSettings
from lora_llava.benchmark.comparison_run import run_in_process
from lora_llava.core.errors import UserError
from lora_llava.data.templates.named_templates import chat_template, get_template
from lora_llava.model.base import build_processor
from lora_llava.model.families.tower_families import image_processor_of
from lora_llava.model.random_weights import build_random_llava
from lora_llava.model.tokenizer import load_tokenizer
from lora_llava.model.weights.parts import DEMO_FOLDER

WORDS = 80
SHAPES_OF_DATA = ("scienceqa", "1", "2", "5", "10")
"""ScienceQA's lengths and share of images, or so many questions about each image, of 80 words with their answer."""
LLAMAFACTORY = {
    "padded": {},
    "padded, nothing recomputed": {"disable_gradient_checkpointing": True},
    "neat_packing": {"neat_packing": True},
    "neat_packing, nothing recomputed": {"neat_packing": True, "disable_gradient_checkpointing": True},
}
"""Its settings beside the common ones; by default it recomputes every layer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--llamafactory", type=Path, help="python of an environment that has llamafactory")
    parser.add_argument("--data", nargs="+", choices=SHAPES_OF_DATA, default=list(SHAPES_OF_DATA), help="rows")
    parser.add_argument("--samples", type=int, default=20, help="samples of an optimizer step")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each side, after one that is not timed")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each side, of which the fastest counts")
    parser.add_argument("--cutoff-len", type=int, default=4096, help="most tokens of a packed row, ours and theirs")
    parser.add_argument("--shape", default="tiny_body", choices=["tiny", "tiny_body"])


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Return samples per second of every side on every kind of rows; the sides run in turn, each in a new process."""
    if args.llamafactory is not None and not args.llamafactory.is_file():
        raise UserError(f"--llamafactory: {args.llamafactory} does not exist; name the python of its environment")
    found = []
    for data in args.data:
        best: dict[str, dict[str, Any]] = {}
        for _ in range(args.repeats):
            for name, result in _sides(args, data):
                if name not in best or result["samples_per_second"] > best[name]["samples_per_second"]:
                    best[name] = result
                print(data, name, result, flush=True)
        ours, rest = best["ours"]["samples_per_second"], [b for name, b in best.items() if not name.startswith("ours")]
        times = {"times_as_fast_as_the_best": round(ours / max(each["samples_per_second"] for each in rest), 2)}
        found.append({"data": data, "sides": best, **times})
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    return {"settings": settings, "threads": torch.get_num_threads(), "rows": found}


def _sides(args: argparse.Namespace, data: str) -> Any:
    words, questions = (None, 1) if data == "scienceqa" else (WORDS, int(data))
    for side, micro in (("ours", _samples_of_a_row(args, questions)), ("trl_random", 4)):
        settings = BenchmarkSettings(
            side=side,
            shape=args.shape,
            batch_size=args.samples,
            micro_batch=micro,
            steps=args.steps,
            r=16,
            optimizer="adamw_torch",
            cap_bytes=None,
            words=words,
            questions=questions,
        )
        result = run_in_process(settings)
        yield (
            side,
            {key: result[key] for key in ("samples_per_second", "peak_memory_bytes", "micro_batch", "losses")},
        )
    if args.llamafactory is None:
        return
    with tempfile.TemporaryDirectory(prefix="rivals_") as folder:
        count = args.samples * (args.steps + 1)
        _write(Path(folder), args.shape, draw_rows(count, 0, words, questions))
        for name, own in LLAMAFACTORY.items():
            yield f"LLaMA-Factory, {name}", _llamafactory(args, Path(folder), own, count)


def _samples_of_a_row(args: argparse.Namespace, questions: int) -> int:
    """Return the samples of a packed row: as many as `cutoff_len` has room for, each shared image counted once."""
    sizes = (size for size in range(args.samples, 0, -1) if args.samples % size == 0)
    return next(size for size in sizes if 576 * -(-size // questions) + WORDS * size <= args.cutoff_len)


def _write(folder: Path, shape: str, rows: Sequence[Any]) -> None:
    """Write the random model, and the rows in LLaVA's format, as LLaMA-Factory reads both."""
    tokenizer = load_tokenizer(DEMO_FOLDER / "llm")
    config = shape_config(shape, len(tokenizer), int(tokenizer.convert_tokens_to_ids("<image>")))
    model = build_random_llava(config, quantization="none", dtype=torch.float32, device=torch.device("cpu"), seed=0)
    pixels = image_processor_of(DEMO_FOLDER / "none", config)
    build_processor(tokenizer, config, pixels, chat_template(get_template("vicuna_v1", ""))).save_pretrained(
        folder / "model"
    )
    model.save_pretrained(folder / "model")
    data, images = folder / "data", DrawnImages()
    data.mkdir()
    names = sorted({str(name) for row in rows for name in row.images})
    for name in names:
        (data / f"{name}.png").write_bytes(images.read(name))
    roles = {"user": "human", "assistant": "gpt"}
    written = [
        {
            "conversations": [{"from": roles[turn.role], "value": turn.text} for turn in row.turns],
            "images": [f"{name}.png" for name in row.images],
        }
        for row in rows
    ]
    (data / "rows.json").write_text(json.dumps(written))
    columns = {"messages": "conversations", "images": "images"}
    info = {"rows": {"file_name": "rows.json", "formatting": "sharegpt", "columns": columns}}
    (data / "dataset_info.json").write_text(json.dumps(info))


def _llamafactory(args: argparse.Namespace, folder: Path, own: dict[str, Any], count: int) -> dict[str, Any]:
    """Run LLaMA-Factory on one epoch of the rows; the first step is not timed."""
    packed = own.get("neat_packing", False)
    at_once = {"per_device_train_batch_size": 1 if packed else 4}
    samples_at_once = args.cutoff_len // (576 + WORDS) if packed else 4
    steps = {"gradient_accumulation_steps": max(1, args.samples // samples_at_once), "cutoff_len": args.cutoff_len}
    given = {**own, **at_once, **steps, "threads": torch.get_num_threads()}
    command = [str(args.llamafactory), str(Path(__file__).with_name("llamafactory_side.py")), str(folder)]
    done = subprocess.run([*command, json.dumps(given)], capture_output=True, text=True, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise UserError(f"LLaMA-Factory ended without a result:\n{done.stderr[-2000:]}")
    result = json.loads(line.removeprefix("RESULT "))
    times = result["times"]
    if len(times) > 1:  # samples per step vary in packed rows: the steps are as good as equal
        count, times = count * (len(times) - 1) // len(times), times[1:]
    return {
        "samples_per_second": count / sum(times),
        "peak_memory_bytes": result["peak_memory_bytes"],
        "steps": len(times),
    }
