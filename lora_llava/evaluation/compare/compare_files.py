"""The predictions of runs that are compared, read and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_llava.core.errors import UserError
from lora_llava.evaluation.answer_metrics import EXACT, text_metrics
from lora_llava.evaluation.scienceqa import COLUMNS

SCIENCEQA, CONVERSATIONS = "scienceqa", "conversations"
PREDICTIONS = ("predictions.jsonl", "predictions_after.jsonl")
"""What `lora-llava evaluate` and `lora-llava finetune` leave in a run directory."""

Row = dict[str, Any]


_NO_MATTER = ("evaluation.generate_every", "evaluation.generate_rows", "evaluation.before", "training.report_to")
"""Keys of a recipe that neither weights nor answers depend on."""


@dataclass(frozen=True)
class Run:
    """The marked answers of one run.

    Attributes:
        name: Short, one of a kind among those compared.
        file: Where the answers stand.
        kind: `SCIENCEQA` or `CONVERSATIONS`.
        rows: The answers, in the file's order.
        output_dir: The recipe's, "" without a recipe.
        seed: The recipe's, None without a recipe.
        settings: The rest of the recipe by `key.sub`, None without a recipe.
    """

    name: str
    file: Path
    kind: str
    rows: list[Row]
    output_dir: str = ""
    seed: int | None = None
    settings: Mapping[str, Any] | None = None


def read_runs(paths: Sequence[Path], recipes: Mapping[Path, Mapping[str, Any]]) -> list[Run]:
    """Read the predictions of several runs.

    Args:
        paths: Run directories or predictions files.
        recipes: The recipe's plain content for the paths that have one.

    Returns:
        The runs, in the order of `paths`.

    Raises:
        UserError: For a path without predictions, one that is named twice, a malformed line, or answers of two kinds.
    """
    files = [find_predictions(path) for path in paths]
    for number, file in enumerate(files):
        if file.resolve() in [other.resolve() for other in files[:number]]:
            raise UserError(f"{paths[number]} is named twice; name each run once")
    runs = []
    for path, file, name in zip(paths, files, run_names(paths), strict=True):
        kind, rows = read_predictions(file)
        if path not in recipes:
            runs.append(Run(name, file, kind, rows))
            continue
        recipe = dict(recipes[path])
        output_dir, seed = str(recipe.pop("output_dir", "")), recipe.pop("seed", None)
        settings = {key: value for key, value in flatten(recipe).items() if key not in _NO_MATTER}
        runs.append(Run(name, file, kind, rows, output_dir, seed, settings))
    for run in runs:
        if run.kind != runs[0].kind:
            raise UserError(
                f"{run.file} holds answers to {run.kind}, {runs[0].file} to {runs[0].kind}; compare one kind"
            )
    return runs


def find_predictions(path: Path) -> Path:
    """The predictions that a path names.

    Args:
        path: A predictions file, or a directory with `predictions.jsonl` or `predictions_after.jsonl`; of both the
            newer, as a run may have been trained anew after it was evaluated.

    Returns:
        The file.

    Raises:
        UserError: Where there is none.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path} is missing; name a run directory or a predictions file")
    found = [path / name for name in PREDICTIONS if (path / name).is_file()]
    if not found:
        raise UserError(f"{path} holds no {' or '.join(PREDICTIONS)}; run `lora-llava evaluate {path}` first")
    return max(found, key=lambda file: file.stat().st_mtime_ns)


def run_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, two parts of a file's; where these are not all different, the paths as they are."""
    short = [f"{path.resolve().parent.name}/{path.name}" if path.is_file() else path.resolve().name for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


def read_predictions(file: Path, texts: Sequence[str] = ()) -> tuple[str, list[Row]]:
    """Read a predictions file of either kind; keys that are not needed are left as they are.

    Args:
        file: JSONL, one marked answer a line.
        texts: Further keys, each a text, that every line needs.

    Returns:
        The kind, and the rows.

    Raises:
        UserError: Naming the first line that is malformed or of another kind.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # splitlines would part an answer at U+2028
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8: {error}") from None
    kind, rows = "", []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}, line {number}: not JSON ({error}); write the predictions anew") from None
        kind = kind or _kind(row)
        wrong = _what_is_wrong(row, kind, texts)
        if wrong:
            raise UserError(f"{file}, line {number}: {wrong}; name a predictions file of evaluate or finetune")
        rows.append(row)
    if not rows:
        raise UserError(f"{file} is empty; run `lora-llava evaluate` to write it")
    return kind, rows


def _kind(row: Any) -> str:
    return CONVERSATIONS if isinstance(row, dict) and EXACT in row else SCIENCEQA


def _what_is_wrong(row: Any, kind: str, texts: Sequence[str]) -> str:
    """What a line lacks of its kind, or nothing."""
    if not isinstance(row, dict):
        return f"{type(row).__name__} and not an object"
    right = {"question_id": isinstance(row.get("question_id"), str)}
    if kind == CONVERSATIONS:
        right |= {name: isinstance(row.get(name), str) for name in ("question", "reference")}
        right |= {metric.key: metric.is_valid(row.get(metric.key)) for metric in text_metrics() if metric.required}
        right |= {name: isinstance(row.get(name, ""), str) for name in ("source", "type")}
    else:
        right |= {name: type(row.get(name)) is int for name in ("prediction", "answer")}
        named = row.get("categories")
        right["categories"] = isinstance(named, list) and all(each in COLUMNS[1:] for each in named)
    right |= {name: isinstance(row.get(name), str) for name in texts}
    wrong = next((name for name, is_right in right.items() if not is_right), "")
    return wrong and (f"{wrong} is {row[wrong]!r}" if wrong in row else f"no {wrong}")


def flatten(content: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """A recipe's values by `key.sub`; lists are values."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{above}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return flat
