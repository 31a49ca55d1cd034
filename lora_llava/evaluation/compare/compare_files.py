"""Read and check the predictions files of the runs to compare."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_llava.core.errors import UserError
from lora_llava.evaluation.answer_metrics import EXACT, text_metrics
from lora_llava.evaluation.scienceqa import COLUMNS
from lora_llava.runs.check_run import check_run

SCIENCEQA, CONVERSATIONS = "scienceqa", "conversations"
PREDICTIONS = ("predictions.jsonl", "predictions_after.jsonl")
"""Predictions files that `lora-llava evaluate` and `lora-llava finetune` write into a run directory."""

Row = dict[str, Any]


_IRRELEVANT = ("evaluation.generate_every", "evaluation.generate_rows", "evaluation.before", "training.report_to")
"""Keys of a recipe that affect neither weights nor answers."""


@dataclass(frozen=True)
class ComparedRun:
    """The scored answers of one run.

    Attributes:
        name: A short name, unique among the compared runs.
        file: The predictions file.
        kind: `SCIENCEQA` or `CONVERSATIONS`.
        rows: The answers, in the order of the file.
        output_dir: From the recipe; "" without a recipe.
        seed: From the recipe; None without a recipe.
        settings: The rest of the recipe by `key.sub`; None without a recipe.
    """

    name: str
    file: Path
    kind: str
    rows: list[Row]
    output_dir: str = ""
    seed: int | None = None
    settings: Mapping[str, Any] | None = None


def read_runs(paths: Sequence[Path], recipes: Mapping[Path, Mapping[str, Any]]) -> list[ComparedRun]:
    """Read the predictions of several runs.

    Args:
        paths: Run directories or predictions files.
        recipes: Content of the recipe for each path that has one.

    Returns:
        The runs, in the order of `paths`.

    Raises:
        UserError: If a path has no predictions or is named twice, a line is malformed, or the answers are of two kinds.
    """
    files = [find_predictions(path) for path in paths]
    for number, file in enumerate(files):
        if file.resolve() in [other.resolve() for other in files[:number]]:
            raise UserError(f"{paths[number]} is named twice; name each run once")
    runs = []
    for path, file, name in zip(paths, files, run_names(paths), strict=True):
        kind, rows = read_predictions(file)
        if path not in recipes:
            runs.append(ComparedRun(name, file, kind, rows))
            continue
        recipe = dict(recipes[path])
        output_dir, seed = str(recipe.pop("output_dir", "")), recipe.pop("seed", None)
        settings = {key: value for key, value in flatten(recipe).items() if key not in _IRRELEVANT}
        runs.append(ComparedRun(name, file, kind, rows, output_dir, seed, settings))
    for run in runs:
        if run.kind != runs[0].kind:
            raise UserError(
                f"{run.file} has answers to {run.kind}, {runs[0].file} to {runs[0].kind}; compare runs of one kind"
            )
    return runs


def find_predictions(path: Path) -> Path:
    """Find the predictions file that a path names.

    Args:
        path: A predictions file, or a directory with `predictions.jsonl` or `predictions_after.jsonl`. If it has both,
            the newer one counts, as a run may have been trained again after its evaluation.

    Returns:
        The file.

    Raises:
        UserError: If none exists.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        check_run(path, "a run directory or a predictions file")
    found = [path / name for name in PREDICTIONS if (path / name).is_file()]
    others = sorted(
        file.name for file in path.glob("predictions_*.jsonl") if not file.name.startswith("predictions_before")
    )
    if not found and others:
        raise UserError(f"{path} has no {' or '.join(PREDICTIONS)}; it has {', '.join(others)}; name that file")
    if not found:
        check_run(path)
        raise UserError(f"{path} has no {' or '.join(PREDICTIONS)}; run `lora-llava evaluate {path}` first")
    return max(found, key=lambda file: file.stat().st_mtime_ns)


def run_names(paths: Sequence[Path]) -> list[str]:
    """Return the last part of each directory and the last two of each file; the full paths if these are not unique."""
    short = [f"{path.resolve().parent.name}/{path.name}" if path.is_file() else path.resolve().name for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


def read_predictions(file: Path, texts: Sequence[str] = ()) -> tuple[str, list[Row]]:
    """Read a predictions file of either kind; unknown keys are kept.

    Args:
        file: JSONL with one scored answer per line.
        texts: Further keys that must hold a text in every line.

    Returns:
        The kind, and the rows.

    Raises:
        UserError: If a line is malformed or of another kind; names the first such line.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # splitlines would split an answer at U+2028
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8: {error}") from None
    kind, rows = "", []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}, line {number}: not JSON ({error}); write the predictions again") from None
        kind = kind or _kind(row)
        problem = _find_problem(row, kind, texts)
        if problem:
            raise UserError(f"{file}, line {number}: {problem}; name a predictions file of evaluate or finetune")
        rows.append(row)
    if not rows:
        raise UserError(f"{file} is empty; run `lora-llava evaluate` to write it")
    return kind, rows


def _kind(row: Any) -> str:
    return CONVERSATIONS if isinstance(row, dict) and EXACT in row else SCIENCEQA


def _find_problem(row: Any, kind: str, texts: Sequence[str]) -> str:
    """Return what is wrong with a line of this kind, or ""."""
    if not isinstance(row, dict):
        return f"{type(row).__name__}, not an object"
    valid = {"question_id": isinstance(row.get("question_id"), str)}
    if kind == CONVERSATIONS:
        valid |= {name: isinstance(row.get(name), str) for name in ("question", "reference")}
        valid |= {metric.key: metric.is_valid(row.get(metric.key)) for metric in text_metrics() if metric.required}
        valid |= {name: isinstance(row.get(name, ""), str) for name in ("source", "type")}
    else:
        valid |= {name: type(row.get(name)) is int for name in ("prediction", "answer")}
        named = row.get("categories")
        valid["categories"] = isinstance(named, list) and all(each in COLUMNS[1:] for each in named)
    valid |= {name: isinstance(row.get(name), str) for name in texts}
    wrong = next((name for name, is_valid in valid.items() if not is_valid), "")
    return wrong and (f"{wrong} is {row[wrong]!r}" if wrong in row else f"no {wrong}")


def flatten(content: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return the values of a recipe by `key.sub`; a list is one value."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{above}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return flat
