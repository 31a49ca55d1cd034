"""`report.html`: a run on one page, with curves, tables, and answers with their images."""

from __future__ import annotations

import json
import random
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel, TypeAdapter, ValidationError, create_model

from lora_llava.core.errors import UserError
from lora_llava.data.conversation import Conversation
from lora_llava.data.images.image_files import image_file
from lora_llava.data.images.image_sources import BadImageError
from lora_llava.evaluation.answer_metrics import EXACT, METRICS
from lora_llava.evaluation.answers import is_answer_table
from lora_llava.evaluation.compare.compare_files import CONVERSATIONS, Row, read_predictions
from lora_llava.evaluation.compare.comparison import is_right
from lora_llava.evaluation.evaluate import EvaluationOptions, open_evaluation
from lora_llava.evaluation.figures.page_tables import confusion_tables, score_tables
from lora_llava.evaluation.lmms.benchmark_table import public_tables
from lora_llava.evaluation.scienceqa import COLUMNS
from lora_llava.evaluation.scoring import EvaluationResult
from lora_llava.pages.report_page import GalleryItem, RunReport, Table, render_report
from lora_llava.pages.report_plots import Curve
from lora_llava.planning.memory import GIB
from lora_llava.recipe import Recipe, load_recipe, recipe_hash
from lora_llava.recipe.io import RECIPE_FILE
from lora_llava.runs.check_run import check_run
from lora_llava.runs.directory import METRICS_FILE, is_run, peak_memory
from lora_llava.splits.split_rows import Split

REPORT_FILE = "report.html"
PREDICTIONS_FILE = "predictions_after.jsonl"
_SHOWN = 20
"""Most right answers in the gallery, and most wrong ones."""
_NAMED = 5
"""Most question ids that a note lists."""

_Pairs = list[tuple[float, float]]


class _Losses(BaseModel):
    train: _Pairs
    validation: _Pairs


class _Train(BaseModel):
    seconds: float
    tokens: int
    supervised_tokens: int
    peak_memory_bytes: int
    peak_reserved_bytes: int | None = None
    steps: int
    loss_curve: _Losses
    curves: dict[str, _Pairs] = {}


class _Trained(BaseModel):
    trained_parameters: dict[str, int]


class _Metrics(BaseModel):
    """The part of `metrics.json` that the page shows."""

    train: _Train
    model: _Trained
    machine: dict[str, Any]
    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None


def write_report(folder: Path, recipe: Recipe, metrics: dict[str, Any], after: EvaluationResult | None) -> Path:
    """Write the report of a run.

    Args:
        folder: The run directory.
        recipe: The recipe of the run.
        metrics: Content of its `metrics.json`.
        after: The evaluation after training; None leaves the gallery out, and a note states why.

    Returns:
        The file.
    """
    chosen = _choose(after.scored, recipe.seed) if after is not None else []
    gallery = [_item(after, i) for i in chosen] if after is not None else []
    notes = [_note_without_gallery(metrics)]
    if after is not None:
        notes = _notes(after, dict(zip(chosen, gallery, strict=True)))
    report = RunReport(
        title=f"{folder.name}: Stage {recipe.stage}",
        facts=_facts(recipe, metrics),
        curves=_curves(metrics["train"], _scores(metrics)),
        findings=(metrics.get("figures") or {}).get("sentences", []),
        tables=_tables(metrics),
        gallery=gallery,
        notes=[*notes, *(metrics.get("continues") or {}).get("rows", ())],
    )
    file = folder / REPORT_FILE
    file.write_text(render_report(report, folder), encoding="utf-8")
    return file


def rebuild_report(run: str) -> Path:
    """Write the report of a finished run again, from its metrics, predictions and data.

    Args:
        run: The run directory.

    Returns:
        The file.

    Raises:
        UserError: If the folder is not a finished run, a file of it cannot be read, or its data has changed.
    """
    folder = Path(run)
    check_run(run)
    if not (is_run(folder) and (folder / METRICS_FILE).is_file() and (folder / RECIPE_FILE).is_file()):
        raise UserError(f"{run} is not a finished run with {METRICS_FILE} and {RECIPE_FILE}; name one")
    metrics = _read_metrics(folder / METRICS_FILE)
    recipe = load_recipe(folder / RECIPE_FILE)
    file = folder / PREDICTIONS_FILE
    if not metrics.get("after") or not file.is_file():
        return write_report(folder, recipe, metrics, None)
    kind, scored = read_predictions(file, texts=["text"])
    if len(scored) != (count := _count_questions(metrics["after"])):
        raise UserError(f"{file} has {len(scored):,} answers, the table in {METRICS_FILE} has {count:,}; restore it")
    # With the recipe named, all rows are read, also those the run dropped; each answer is matched to its row.
    split = open_evaluation(run, EvaluationOptions(bad_images="wrong"), recipe=str(folder / RECIPE_FILE)).split
    rows = _evaluated_rows(file, scored, split, own=kind == CONVERSATIONS)
    return write_report(folder, recipe, metrics, EvaluationResult(metrics["after"], rows, scored, split))


def _scores(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {name: metrics[name] for name in ("before", "after") if metrics.get(name)}


def _tables(metrics: Mapping[str, Any]) -> list[Table]:
    figures = metrics.get("figures")
    return [*score_tables(_scores(metrics), figures), *confusion_tables(figures), *public_tables(metrics)]


def _read_metrics(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    try:
        _Metrics.model_validate_json(content, strict=True)
        metrics: dict[str, Any] = json.loads(content)
        for name in ("before", "after"):
            _check_table(name, metrics.get(name))
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}." for part in first["loc"]).removesuffix(".")
        problem = f"{where}: {first['msg']}" if where else first["msg"]
        raise UserError(f"{file}: {problem}; restore it, or train the run again") from None
    try:
        _tables(metrics)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{file}: figures cannot be read ({error!r}); restore it, or remove figures from it") from None
    return metrics


def _check_table(name: str, table: dict[str, Any] | None) -> None:
    if is_answer_table(table):
        form: Any = TypeAdapter(dict[str, dict[str, _scores_model()]])  # type: ignore[misc, arg-type]
        form.validate_json(json.dumps({name: table}), strict=True)
    elif table:
        columns = {column: table.get(column) for column in COLUMNS}
        form = TypeAdapter(dict[str, dict[str, tuple[float, int, int]]])
        form.validate_json(json.dumps({name: columns}), strict=True)


def _scores_model() -> type[BaseModel]:
    """Build the model of the scores of one group, from `METRICS`."""
    fields: dict[str, Any] = {"questions": (int, ...)}
    for metric in METRICS.values():
        kind = float if metric.function is not None and metric.required else float | None
        fields[metric.saved_as] = (kind, ... if metric.required else None)
    return create_model("Scores", **fields)


def _count_questions(table: dict[str, Any]) -> int:
    return int(table["all"]["questions"] if is_answer_table(table) else table["AVG"][2])


def _evaluated_rows(file: Path, scored: Sequence[Row], split: Split, own: bool) -> list[Conversation]:
    """Find the row of each line of a predictions file; other rows may have been dropped for their images."""
    rows: defaultdict[tuple[str, ...], deque[Conversation]] = defaultdict(deque)
    for row in split.read(range(len(split.rows))):
        identity = [str(row.extra.get("source", "")), _question(row), row.turns[-1].shown] if own else []
        rows[row.row_id, *identity].append(row)
    found = []
    for line in scored:
        identity = [line.get("source", ""), line["question"], line["reference"]] if own else []
        same = rows.get((line["question_id"], *identity))
        if not same:
            raise UserError(
                f"{file} answers questions that the run's data no longer has, such as {line['question_id']}; "
                "restore the data"
            )
        found.append(same.popleft())  # equal rows are used one after the other
    return found


def _adapter(recipe: Recipe) -> str:
    lora = recipe.lora
    if lora is None:
        return "none"
    parts = [f"r {lora.r}, alpha {lora.alpha:g}"]
    if lora.vision is not None:
        parts.append(f"vision tower r {lora.vision.r}, alpha {lora.vision.alpha or lora.vision.r:g}")
    parts += [f"init {lora.init}"] if lora.init != "default" else []
    parts += [f"LoRA+ {recipe.training.loraplus_ratio:g}"] if recipe.training.loraplus_ratio else []
    return "; ".join(parts)


def _facts(recipe: Recipe, metrics: dict[str, Any]) -> list[tuple[str, str]]:
    train, machine = metrics["train"], metrics["machine"]
    counts = metrics["model"]["trained_parameters"]
    data = ", ".join(dict.fromkeys(source.path for source in recipe.data.train_sources()))
    section = recipe.model
    start = section.start_from
    facts = [
        ("model", start.llava or f"{section.llm} + {section.vision_tower}"),
        ("images", "in tiles (model.high_resolution)" if section.high_resolution else ""),
        ("data", f"{recipe.data.format}: {data}"),
        ("trained", ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)),
        ("adapter", _adapter(recipe)),
        ("continues", str(start.run or "")),
        ("base", {"nf4": "NF4", "none": "unquantised"}[section.quantization]),
        ("steps", _steps(train)),
        ("kept", _kept(train)),
        ("tokens", f"{train['tokens']:,}, {100 * train['supervised_tokens'] / max(1, train['tokens']):.0f}% trained"),
        ("time", f"{train['seconds']:,.0f} s, {train['tokens'] / max(1e-9, train['seconds']):,.0f} tokens/s"),
        ("peak memory", peak_memory(train)),
        ("machine", str(machine.get("gpu") or f"{machine.get('processor')}, {machine.get('cores')} cores")),
        ("seed", str(recipe.seed)),
        ("recipe", recipe_hash(recipe)[:12]),
    ]
    return [(name, value) for name, value in facts if value]


def _steps(train: dict[str, Any]) -> str:
    if not (reason := train.get("stopped_early")):
        return f"{train['steps']:,}"
    return f"{train['steps']:,} of {train['planned_steps']:,}, stopped early: {reason}"


def _kept(train: dict[str, Any]) -> str:
    """Return the step and validation loss of the checkpoint kept; empty without validation or in an earlier run."""
    loss = train.get("best_validation_loss")
    known = loss is not None and "kept_step" in train
    return f"step {train['kept_step']:,}, validation loss {loss:.4f}" if known else ""


def _curves(train: dict[str, Any], tables: dict[str, Any]) -> list[Curve]:
    losses, others = train["loss_curve"], train.get("curves", {})

    def points(pairs: Sequence[Sequence[float]] | None, unit: float = 1.0) -> list[tuple[float, float]]:
        return [(step, value / unit) for step, value in pairs or []]

    free = any(is_answer_table(table) for table in tables.values())
    curves = [
        Curve(
            "Loss",
            "nats per token",
            {name: points(losses[name]) for name in ("train", "validation")},
            robust=True,
            log_toggle=True,
            kept=("validation", float(train["kept_step"])) if "kept_step" in train else None,
        ),
        Curve(
            f"{METRICS[EXACT].title.capitalize() if free else 'Accuracy'} during training",
            "%",
            {"validation rows": points(others.get("validation_score"))},
        ),
        Curve("Learning rate", "", {"learning rate": points(others.get("learning_rate"))}),
        Curve("Speed", "tokens/s", {"training": points(others.get("tokens_per_second"))}),
        Curve("Memory", "GiB", {"peak so far": points(others.get("memory_bytes"), GIB)}),
    ]
    return [curve for curve in curves if any(curve.series.values())]


def _choose(scored: Sequence[Row], seed: int) -> list[int]:
    """Choose some wrong and some right answers by the seed, in the order of the rows."""
    chosen: list[int] = []
    for right in (False, True):
        places = [i for i, line in enumerate(scored) if is_right(line) == right]
        chosen += random.Random(seed).sample(places, min(_SHOWN, len(places)))
    return sorted(chosen)


def _question(row: Conversation) -> str:
    return row.turns[-2].words


def _item(after: EvaluationResult, index: int) -> GalleryItem:
    row, line = after.rows[index], after.scored[index]
    shown = _images(row, after)
    return GalleryItem(
        question=_question(row),
        reference=row.turns[-1].shown,
        text=line["text"],
        right=is_right(line),
        images=[image for _, image, _ in shown],
        names=[name for name, _, _ in shown],
        files=[file for _, _, file in shown],
        question_id=line["question_id"],
        categories=(line.get("categories") or [line[name] for name in ("source", "type") if line.get(name)])
        + ([row.named] if row.named else []),
    )


def _images(row: Conversation, after: EvaluationResult) -> list[tuple[str, Image.Image, Path | None]]:
    """Return the images that can be opened, with their names and files."""
    found = []
    for name in row.images:
        try:
            images = after.split.images
            found.append((images.label(name), images.open(name), image_file(images, name)))
        except BadImageError:  # listed in the notes
            continue
    return found


def _note_without_gallery(metrics: Mapping[str, Any]) -> str:
    if not metrics.get("after"):
        return "No gallery of answers: the run evaluated no questions after training."
    return f"No gallery of answers: {PREDICTIONS_FILE} is not in the run's folder."


def _notes(after: EvaluationResult, gallery: Mapping[int, GalleryItem]) -> list[str]:
    right = sum(map(is_right, after.scored))
    notes = [
        f"The gallery shows up to {_SHOWN} of {len(after.scored) - right:,} wrong and of {right:,} right answers, "
        "chosen by the seed."
    ]
    bad = [line["question_id"] for line in after.scored if "problem" in line]
    if bad:
        notes.append(f"{_count(bad)} wrong because an image could not be opened: {_named(bad)}.")
    missing = [
        item.question_id
        for i, item in gallery.items()
        if len(item.images) < len(after.rows[i].images) and "problem" not in after.scored[i]
    ]
    if missing:
        notes.append(f"Shown without an image that can no longer be opened: {_named(missing)}.")
    return notes


def _count(ids: Sequence[str]) -> str:
    return "1 question counts as" if len(ids) == 1 else f"{len(ids):,} questions count as"


def _named(ids: Sequence[str]) -> str:
    return ", ".join(ids[:_NAMED]) + (f" and {len(ids) - _NAMED:,} more" if len(ids) > _NAMED else "")
