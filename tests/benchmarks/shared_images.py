"""Speed with several questions per image: each image computed once, against once per question.

Both sides train the same random model on the same samples with cached features, in turn, in one process.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from transformers import LlavaConfig

from lora_llava.benchmark.benchmark_rows import shape_config
from lora_llava.data.collator import PackedCollator
from lora_llava.data.encode import IGNORE_INDEX
from lora_llava.data.packed_rows.shared_prefixes import Prefix
from lora_llava.data.tokens import Stop
from lora_llava.inference.generate import generate_answers
from lora_llava.inference.question import Question
from lora_llava.inference.sampling import Sampling
from lora_llava.model.adapters import add_adapters, lora_config
from lora_llava.model.fast_path.attention import use_flash_varlen
from lora_llava.model.fast_path.lean import make_lean
from lora_llava.model.fast_path.trained_loss import labelled_loss
from lora_llava.model.loading import default_device
from lora_llava.model.random_weights import build_random_llava
from lora_llava.model.tokenizer import load_tokenizer
from lora_llava.model.vision import accept_features
from lora_llava.model.weights.parts import DEMO_FOLDER
from lora_llava.recipe.schema import LINEARS

IMAGE_TOKENS, BEFORE = 576, 6
VOCABULARY, IMAGE = 898, 896  # the demo's tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 2, 5, 10], help="questions per image")
    parser.add_argument("--text-tokens", type=int, default=80, help="tokens of a question and its answer")
    parser.add_argument("--samples", type=int, default=20, help="samples of an optimizer step")
    parser.add_argument("--tokens-per-row", type=int, default=8192, help="most tokens of a packed row")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--shape", default="tiny_body", choices=["tiny", "tiny_body", "7b"])


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Return samples per second of both sides, and the ratio of their FLOPs, for each number of questions."""
    config = shape_config(args.shape, VOCABULARY, IMAGE)
    model = _model(config)
    training = [_compare(args, config, model, questions) for questions in args.questions]
    answers = [_compare_answers(args, config, model, questions) for questions in args.questions]
    settings = {key: value for key, value in vars(args).items() if key not in ("output", "benchmark")}
    return {"settings": settings, "training": training, "answers": answers}


def _model(config: LlavaConfig) -> Any:
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    model = build_random_llava(config, quantization="nf4" if cuda else "none", dtype=dtype, device=default_device())
    accept_features(model)
    use_flash_varlen(model)
    peft_model = add_adapters(model, lora_config(r=16, alpha=16, targets=LINEARS)).train()
    make_lean(model.model.language_model)
    return peft_model


def _compare(args: argparse.Namespace, config: LlavaConfig, model: Any, questions: int) -> dict[str, Any]:
    samples = _samples(args, questions)
    width = config.vision_config.hidden_size
    collator = PackedCollator(lambda names: torch.randn(len(names), IMAGE_TOKENS, width))
    sides = {
        "shared": _rows(samples, args.tokens_per_row),
        "packed": _rows([each | {"prefix": None} for each in samples], args.tokens_per_row),
    }
    batches = {side: [collator(row) for row in rows] for side, rows in sides.items()}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    for step in range(args.steps + 1):  # the first is a warm-up
        for side, rows in batches.items():
            taken = _step(model, optimizer, rows)
            if step:
                seconds[side].append(taken)
    rate = {side: args.samples / min(times) for side, times in seconds.items()}
    flops = {side: sum(_flops(config, batch) for batch in rows) for side, rows in batches.items()}
    result = {
        "questions_per_image": questions,
        "samples_per_second": {side: round(value, 2) for side, value in rate.items()},
        "tokens": {side: sum(batch["input_ids"].numel() for batch in rows) for side, rows in batches.items()},
        "times_as_fast": round(rate["shared"] / rate["packed"], 2),
        "flops_ratio": round(flops["packed"] / flops["shared"], 2),
    }
    print(result, flush=True)
    return result


@torch.inference_mode()
def _compare_answers(args: argparse.Namespace, config: LlavaConfig, model: Any, questions: int) -> dict[str, Any]:
    """Compare answers of at most 8 tokens, with images that questions have in common and with one name each."""
    tokenizer = load_tokenizer(DEMO_FOLDER / "llm")
    generator = torch.Generator().manual_seed(0)
    stored = torch.randn(args.samples, IMAGE_TOKENS, config.vision_config.hidden_size, generator=generator)
    asked = []
    for _ in range(args.samples):
        text = torch.randint(3, IMAGE - 1, (args.text_tokens // 3,), generator=generator).tolist()
        asked.append([*range(3, 3 + BEFORE), *[IMAGE] * IMAGE_TOKENS, *text])
    given = {
        "tokenizer": tokenizer,
        "load_pixels": lambda names: torch.stack([stored[int(name.split()[0])] for name in names]),
        "batch_size": args.samples,
        "sampling": Sampling(max_new_tokens=8),
        "stop": Stop([tokenizer.eos_token_id], None),
    }
    seconds, found = {"shared": 1e9, "alone": 1e9}, {}
    for _ in range(args.steps):
        for side in seconds:
            names = [f"{i // questions}" + ("" if side == "shared" else f" {i}") for i in range(args.samples)]
            rows = [Question(ids, (name,)) for ids, name in zip(asked, names, strict=True)]
            start = time.perf_counter()
            found[side] = dict(generate_answers(model, rows, **given))
            seconds[side] = min(seconds[side], time.perf_counter() - start)
    result = {
        "questions_per_image": questions,
        "answers_per_second": {side: round(args.samples / taken, 2) for side, taken in seconds.items()},
        "times_as_fast": round(seconds["alone"] / seconds["shared"], 2),
        "answers_that_differ": sum(found["alone"][i].text != found["shared"][i].text for i in range(args.samples)),
    }
    print(result, flush=True)
    return result


def _samples(args: argparse.Namespace, questions: int) -> list[dict[str, Any]]:
    """Return samples with an image of 576 tokens and a question and answer of `text_tokens` behind it."""
    generator = torch.Generator().manual_seed(0)
    trained = args.text_tokens * 2 // 3
    found = []
    for number in range(args.samples):
        group = number // questions
        text = torch.randint(3, IMAGE - 1, (args.text_tokens,), generator=generator).tolist()
        before = list(range(3, 3 + BEFORE))
        ids = [*before, *[IMAGE] * IMAGE_TOKENS, *text]
        labels = [IGNORE_INDEX] * (len(ids) - trained) + text[-trained:]
        prefix = Prefix(group, BEFORE + IMAGE_TOKENS, 1, 1)
        found.append({"input_ids": ids, "labels": labels, "image_files": [str(group)], "prefix": prefix})
    return found


def _rows(samples: list[dict[str, Any]], budget: int) -> list[list[dict[str, Any]]]:
    """Fill rows in order; a shared prefix is counted once."""
    rows: list[list[dict[str, Any]]] = [[]]
    used = 0
    for sample in samples:
        prefix, before = sample["prefix"], rows[-1][-1]["prefix"] if rows[-1] else None
        own = len(sample["input_ids"]) - (prefix.tokens if prefix is not None and prefix == before else 0)
        if rows[-1] and used + own > budget:
            rows.append([])
            used, own = 0, len(sample["input_ids"])
        rows[-1].append(sample)
        used += own
    return rows


def _step(model: Any, optimizer: torch.optim.Optimizer, batches: list[dict[str, Any]]) -> float:
    device = default_device()
    start = time.perf_counter()
    for batch in batches:
        batch = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = labelled_loss(model, batch)[0]
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _flops(config: LlavaConfig, batch: dict[str, Any]) -> float:
    """Return the FLOPs of a forward pass: matrices, attention's two products, projector and head."""
    text, vision = config.text_config, config.vision_config
    hidden, inner, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    tokens = batch["input_ids"].numel()
    matrices = layers * (4 * hidden * hidden + 3 * hidden * inner) * tokens
    queries, keys = (torch.diff(batch[name]).double() for name in ("cu_seq_lens_q", "cu_seq_lens_k"))
    pairs = float((queries * (keys - queries) + queries * (queries + 1) / 2).sum())
    images = batch["pixel_values"].shape[0] * IMAGE_TOKENS * (vision.hidden_size * hidden + hidden * hidden)
    head = int((batch["labels"] != IGNORE_INDEX).sum()) * hidden * text.vocab_size
    return 2 * (matrices + layers * 2 * hidden * pairs + images + head)
