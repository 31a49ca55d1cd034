"""The concept filter on generated captions: captions a second, and whether memory stays flat."""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import accumulate
from random import Random
from typing import Any

import psutil

from lora_llava.data.concepts import filter_captions
from lora_llava.data.noun_phrases import TAGGERS, load_noun_phrases

EARLY = 10_000
"""Captions after which memory should not grow."""
SAMPLE_SECONDS = 0.005
TEMPLATES = (
    "a {a} {n} {v} on a {n}", "the {n} and the {a} {a} {n} near the {n}", "{n} {v} a {a} {n} {n}",
    "two {a} {n}s {v} in front of the {n} , with a {n}", "a photo of the {n} {n} at a {a} {n}", "{a} {n}",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--captions", type=int, default=100_000)
    parser.add_argument("--nouns", type=int, default=20_000)
    parser.add_argument("--tagger", choices=TAGGERS, default="light")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Filter to a temporary file; the resident set is sampled until the last row is written."""
    noun_phrases = load_noun_phrases(args.tagger)
    start = time.perf_counter()
    for _ in captions(args.captions, args.nouns, args.seed):
        pass
    generating = time.perf_counter() - start
    at: dict[str, float] = {}

    def rows() -> Iterator[dict[str, str]]:
        for number, caption in enumerate(captions(args.captions, args.nouns, args.seed)):
            if number + 1 == EARLY:
                at["early"] = sampler.peak
            yield {"id": f"{number:09}", "image": f"{number:09}.jpg", "caption": caption}

    with tempfile.TemporaryFile("w") as output, _Sampler() as sampler:
        before, start = sampler.peak, time.perf_counter()
        report = filter_captions(
            rows(),
            lambda row: output.write(json.dumps(row) + "\n"),
            noun_phrases=noun_phrases,
            caption_of=lambda row: row["caption"],
            seed=args.seed,
        )
        seconds = time.perf_counter() - start
    return {
        "captions": args.captions, "nouns": args.nouns, "seed": args.seed, "tagger": noun_phrases.name,
        "seconds": seconds, "of_these_generating_seconds": generating, "captions_per_second": args.captions / seconds,
        "rss_mb_before": before, "peak_rss_mb_at_10000": at.get("early"), "peak_rss_mb": sampler.peak,
        "kept": report.kept, "report": report.as_dict(),
    }  # fmt: skip


def captions(count: int, nouns: int, seed: int) -> Iterator[str]:
    """Captions of invented words, the n-th noun and adjective as frequent as 1 / n (Zipf), none kept."""
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


class _Sampler(threading.Thread):
    """Highest resident set of this process so far, in MB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process()
        self._ended = threading.Event()
        self.peak = 0.0
        self._sample()

    def _sample(self) -> None:
        self.peak = max(self.peak, self._process.memory_info().rss / 1e6)

    def run(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            self._sample()

    def __enter__(self) -> _Sampler:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()
        self._sample()
