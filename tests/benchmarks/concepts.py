"""Measure seconds and memory of `lora-llava filter-captions` on generated captions."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

import psutil

from lora_llava.data.concepts.noun_phrases import TAGGERS

EARLY = 10_000
"""Number of captions after which memory should not grow."""
SAMPLE_SECONDS = 0.01
TEMPLATES = (
    "a {a} {n} {v} on a {n}",
    "the {n} and the {a} {a} {n} near the {n}",
    "{n} {v} a {a} {n} {n}",
    "two {a} {n}s {v} in front of the {n} , with a {n}",
    "a photo of the {n} {n} at a {a} {n}",
    "{a} {n}",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--captions", type=int, default=100_000)
    parser.add_argument("--nouns", type=int, default=20_000)
    parser.add_argument("--tagger", choices=TAGGERS, default="light")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the command in a separate process, on few captions and on all."""
    with tempfile.TemporaryDirectory() as temporary:
        runs = [_run(Path(temporary), count, args) for count in sorted({min(EARLY, args.captions), args.captions})]
    return {"nouns": args.nouns, "seed": args.seed, "tagger": args.tagger, "runs": runs}


def _run(folder: Path, count: int, args: argparse.Namespace) -> dict[str, Any]:
    source, target = folder / f"{count}.jsonl", folder / f"{count}.chosen.jsonl"
    with source.open("w") as stream:
        for number, caption in enumerate(captions(count, args.nouns, args.seed)):
            stream.write(json.dumps({"id": f"{number:09}", "image": f"{number:09}.jpg", "caption": caption}) + "\n")
    verb = [sys.executable, "-m", "lora_llava.commands.main", "filter-captions", str(source), "--output", str(target)]
    start = time.perf_counter()
    process = subprocess.Popen([*verb, "--tagger", args.tagger], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):  # it may end during the reading
            peak = max(peak, psutil.Process(process.pid).memory_info().rss)
        time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise RuntimeError(f"the command ended with {process.returncode}")
    return {
        "captions": count,
        "seconds": round(time.perf_counter() - start, 2),
        "peak_rss_mb": round(peak / 1e6, 1),
        "kept": sum(1 for _ in target.open()),
    }


def captions(count: int, nouns: int, seed: int) -> Iterator[str]:
    """Yield captions of invented words, the n-th noun and adjective with frequency 1 / n (Zipf), one by one."""
    random = Random(seed)
    words = {"n": _invented(random, nouns, ""), "a": _invented(random, 400, "ous"), "v": _invented(random, 300, "ing")}
    weights = {kind: list(accumulate(1 / rank for rank in range(1, len(own) + 1))) for kind, own in words.items()}
    for _ in range(count):
        template = random.choice(TEMPLATES)
        for kind, own in words.items():
            needed = template.count(f"{{{kind}}}")
            for word in random.choices(own, cum_weights=weights[kind], k=needed):
                template = template.replace(f"{{{kind}}}", word, 1)
        yield template


def _invented(random: Random, count: int, ending: str) -> list[str]:
    words: dict[str, None] = {}
    while len(words) < count:
        syllables = [random.choice("bdfgklmnprstvz") + random.choice("aeiou") for _ in range(random.randint(2, 4))]
        words["".join(syllables) + (ending or "m")] = None
    return list(words)
