"""Runs with predictions for comparison tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_llava.evaluation.answers import score_answer
from lora_llava.evaluation.compare.compare_files import read_runs
from lora_llava.evaluation.compare.comparison import Comparison, compare_runs

SEEDS = {"r16-s0": "rrww", "r16-s1": "rrrw", "r32-s0": "rrrr", "r32-s1": "rrrr"}
CATEGORIES = [["NAT", "IMG", "G1-6"], ["SOC", "TXT", "G7-12"]]


def science(marks: str, first: int = 0) -> list[dict[str, Any]]:
    """One row a letter: `r` right, `w` wrong; even questions are of NAT, IMG and G1-6."""
    return [
        {
            "question_id": str(first + n),
            "text": "",
            "prediction": 1 if mark == "r" else 0,
            "answer": 1,
            "categories": CATEGORIES[(first + n) % 2],
        }
        for n, mark in enumerate(marks)
    ]


def own(*texts: str, first: int = 0) -> list[Any]:
    return [score_answer(str(first + n), "mine", "What?", "red cube", text) for n, text in enumerate(texts)]


def written(folder: Path, rows: list[Any], recipe: dict[str, Any] | None = None, name: str = "predictions") -> Path:
    """A run directory with predictions."""
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe_of(seed: int, r: int = 16, **more: Any) -> dict[str, Any]:
    return {"seed": seed, "output_dir": f"runs/{seed}", "lora": {"r": r, "targets": ["q"]}, **more}


def compared(tmp_path: Path, runs: dict[str, Any], recipes: dict[str, Any] | None = None, **how: Any) -> Comparison:
    """Write runs by name and compare them."""
    paths = {name: written(tmp_path / name, rows) for name, rows in runs.items()}
    plain = {paths[name]: recipe for name, recipe in (recipes or {}).items()}
    return compare_runs(read_runs(list(paths.values()), plain), **how)
