"""`report.html`: a run on one page: curves, the tables, and answers with their pictures."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lora_llava.data.conversation import IMAGE_PLACEHOLDER, Conversation
from lora_llava.data.images import BadImageError
from lora_llava.errors import UserError
from lora_llava.evaluation.answers import is_answer_table
from lora_llava.evaluation.ask import choose_rows
from lora_llava.evaluation.intervals import share_interval
from lora_llava.evaluation.report_page import GalleryItem, RunReport, Table, render_report
from lora_llava.evaluation.report_plots import Curve
from lora_llava.evaluation.scienceqa import COLUMNS
from lora_llava.recipe import Recipe, load_recipe, recipe_hash
from lora_llava.training.evaluate import Way, open_evaluation
from lora_llava.training.memory import GIB
from lora_llava.training.run_directory import METRICS_FILE, RECIPE_FILE, is_run
from lora_llava.training.scoring import Asking

REPORT_FILE = "report.html"
_SHOWN = 20
"""Right answers in the gallery, and as many wrong ones."""


def write_report(folder: Path, recipe: Recipe, metrics: dict[str, Any], after: Asking | None) -> Path:
    """Write a run's report.

    Args:
        folder: The run directory.
        recipe: The run's.
        metrics: Content of its `metrics.json`.
        after: What the table after training came of; None leaves the gallery out.

    Returns:
        The file.
    """
    tables = {name: metrics[name] for name in ("before", "after") if metrics.get(name)}
    report = RunReport(
        title=f"{folder.name}: Stage {recipe.stage}",
        facts=_facts(recipe, metrics),
        curves=_curves(metrics["train"], tables),
        tables=_tables(tables),
        gallery=_gallery(after, recipe.seed) if after is not None else [],
        notes=_notes(after),
    )
    file = folder / REPORT_FILE
    file.write_text(render_report(report), encoding="utf-8")
    return file


def rebuild_report(run: str) -> Path:
    """Write a finished run's report again, from its metrics, predictions and data.

    Args:
        run: The run directory.

    Returns:
        The file.

    Raises:
        UserError: Where the folder is no finished run, or its data is not what it was.
    """
    folder = Path(run)
    if not is_run(folder) or not (folder / METRICS_FILE).is_file() or not (folder / RECIPE_FILE).is_file():
        raise UserError(f"{run} is no finished run with {METRICS_FILE} and {RECIPE_FILE}; name one")
    metrics = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
    recipe = load_recipe(folder / RECIPE_FILE)
    file = folder / "predictions_after.jsonl"
    if not metrics.get("after") or not file.is_file():
        return write_report(folder, recipe, metrics, None)
    marked = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    split = open_evaluation(run, Way(bad_images="wrong")).split
    assert recipe.evaluation is not None  # else there were no tables
    rows = split.read(choose_rows(range(len(split.rows)), recipe.evaluation.after, recipe.seed))
    if [row.row_id for row in rows] != [line["question_id"] for line in marked]:
        raise UserError(f"{file} answers other questions than the run's data has now; restore the data")
    return write_report(folder, recipe, metrics, Asking(metrics["after"], rows, marked, split))


def _facts(recipe: Recipe, metrics: dict[str, Any]) -> list[tuple[str, str]]:
    train, machine = metrics["train"], metrics["machine"]
    counts = metrics["model"]["trained_parameters"]
    data = ", ".join(dict.fromkeys(source.path for source in recipe.data.train_sources()))
    section = recipe.model
    start = section.start_from
    facts = [
        ("model", start.llava or f"{section.llm} + {section.vision_tower}"),
        ("data", f"{recipe.data.format}: {data}"),
        ("trained", ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)),
        ("adapter", f"r {recipe.lora.r}, alpha {recipe.lora.alpha:g}" if recipe.lora else "none"),
        ("base", {"nf4": "NF4", "none": "unquantised"}[section.quantization]),
        ("steps", f"{train['steps']:,}"),
        ("tokens", f"{train['tokens']:,}, {100 * train['supervised_tokens'] / max(1, train['tokens']):.0f}% trained"),
        ("time", f"{train['seconds']:,.0f} s, {train['tokens'] / max(1e-9, train['seconds']):,.0f} tokens/s"),
        ("peak memory", f"{train['peak_memory_bytes'] / GIB:.2f} GiB"),
        ("machine", str(machine.get("gpu") or f"{machine.get('processor')}, {machine.get('cores')} cores")),
        ("seed", str(recipe.seed)),
        ("recipe", recipe_hash(recipe)[:12]),
    ]
    return [(name, told) for name, told in facts if told]


def _curves(train: dict[str, Any], tables: dict[str, Any]) -> list[Curve]:
    losses, others = train["loss_curve"], train.get("curves", {})

    def points(pairs: Sequence[Sequence[float]] | None, unit: float = 1.0) -> list[tuple[float, float]]:
        return [(step, value / unit) for step, value in pairs or []]

    free = any(is_answer_table(table) for table in tables.values())
    curves = [
        Curve("Loss", "nats per token", {name: points(losses[name]) for name in ("train", "validation")}),
        Curve(
            "Exact match during training" if free else "Accuracy during training", "%",
            {"validation rows": points(others.get("validation_score"))},
        ),
        Curve("Learning rate", "", {"learning rate": points(others.get("learning_rate"))}),
        Curve("Speed", "tokens/s", {"training": points(others.get("tokens_per_second"))}),
        Curve("Memory", "GiB", {"peak so far": points(others.get("memory_bytes"), GIB)}),
    ]  # fmt: skip
    return [curve for curve in curves if any(curve.series.values())]


def _tables(tables: dict[str, Any]) -> list[Table]:
    if not tables:
        return []
    if any(is_answer_table(table) for table in tables.values()):
        columns = ["", "group", "exact match in %", "F1 in %", "ROUGE-L in %", "loss", "questions"]
        rows = [
            [name, group, *(f"{marks[key]:.2f}" for key in ("exact_match", "f1", "rouge_l")),
             "" if marks["loss"] is None else f"{marks['loss']:.4f}", str(marks["questions"])]
            for name, table in tables.items() for group, marks in table.items()
        ]  # fmt: skip
        return [Table("Answers to held-back rows", columns, rows)]
    rows = [[name, *(f"{table[column][0]:.2f}" for column in COLUMNS)] for name, table in tables.items()]
    last = tables[list(tables)[-1]]
    ends = [share_interval(*last[column][1:]) for column in COLUMNS]
    rows += [[f"95% {name}", *(f"{end[place]:.2f}" for end in ends)] for place, name in enumerate(("from", "to"))]
    rows.append(["questions", *(f"{last[column][2]:,}" for column in COLUMNS)])
    return [Table("Accuracy in % on the test split", ["", *COLUMNS], rows)]


def _is_right(line: dict[str, Any]) -> bool:
    return bool(line["exact"] if "exact" in line else line["prediction"] == line["answer"])


def _gallery(after: Asking, seed: int) -> list[GalleryItem]:
    """Some wrong and some right answers, drawn by the seed, in the rows' order."""
    chosen: list[int] = []
    for right in (False, True):
        places = [i for i, line in enumerate(after.marked) if _is_right(line) == right]
        chosen += random.Random(seed).sample(places, min(_SHOWN, len(places)))
    return [_item(after, i) for i in sorted(chosen)]


def _item(after: Asking, index: int) -> GalleryItem:
    row, line = after.rows[index], after.marked[index]
    return GalleryItem(
        question=row.turns[-2].text.replace(IMAGE_PLACEHOLDER, "").strip(), reference=row.turns[-1].text,
        text=line["text"], right=_is_right(line), pictures=_pictures(row, after),
        categories=line.get("categories") or [line["source"], line["type"]], question_id=line["question_id"],
    )  # fmt: skip


def _pictures(row: Conversation, after: Asking) -> list[Image.Image]:
    found = []
    for name in row.images:
        try:
            found.append(after.split.images.open(name))
        except BadImageError:  # the notes tell of it
            continue
    return found


def _notes(after: Asking | None) -> list[str]:
    if after is None:
        return []
    right = sum(map(_is_right, after.marked))
    notes = [
        f"The gallery shows up to {_SHOWN} of {len(after.marked) - right:,} wrong and of {right:,} right answers, "
        "drawn by the seed."
    ]
    bad = [line["question_id"] for line in after.marked if "problem" in line]
    if bad:
        named = ", ".join(bad[:5])
        notes.append(f"{len(bad):,} questions count as wrong because a picture could not be opened: {named}.")
    return notes
