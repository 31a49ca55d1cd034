"""`lora-llava check`: read all data of a recipe before training, and report what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from lora_llava.core.errors import UserError
from lora_llava.data.checks.duplicates import DUPLICATE
from lora_llava.data.checks.findings import CheckedSource, CheckReport, Finding
from lora_llava.data.checks.source_checks import check_sources
from lora_llava.data.files.cleaned_copy import write_set_without
from lora_llava.data.files.row_files import DataFileError
from lora_llava.data.folder_kinds.folder_kind import number_of
from lora_llava.data.images.image_check import ImageFacts, inspect_images
from lora_llava.data.images.image_id import ImageId, ImageName
from lora_llava.data.selection import tiles_advice
from lora_llava.evaluation.figures.majority import read_majority
from lora_llava.model.start import plan_model
from lora_llava.pages.preview_samples import escape_hidden
from lora_llava.planning.continued_run import check_continued, check_continued_processor
from lora_llava.planning.run_plan import build_run_processor
from lora_llava.prepare.answer_balance import add_balance, balance_lines, train_answers
from lora_llava.recipe import EvaluationSection, Recipe
from lora_llava.runs.directory import write_json
from lora_llava.splits.earlier_rows import earlier_rows
from lora_llava.splits.encoded_sources import OpenSplit, encode_splits, image_cache, show_progress
from lora_llava.splits.refusals import checked_sources, sources_with_images
from lora_llava.splits.split_rows import run_policy, with_image_tokens

_BAR = 40


def check(
    recipe: Recipe,
    *,
    json_file: Path | None = None,
    fix: bool = False,
    copies: dict[Path, Path] | None = None,
    console: Console,
) -> CheckReport:
    """Read all data of a recipe, and report what is wrong with it.

    Args:
        recipe: The recipe.
        json_file: JSON file for the findings.
        fix: Write a cleaned copy next to each file of rows.
        copies: Filled with the copy of the first file of each source that `fix` wrote.
        console: Prints the report.

    Returns:
        The report; with errors, the recipe should not be trained.

    Raises:
        UserError: If the recipe's model or data is missing.
    """
    if json_file is not None:
        _check_json_file(json_file)
    splits: dict[str, OpenSplit] = {}
    try:
        splits, report = _read(recipe)
    except DataFileError as error:
        report = CheckReport(0, [Finding("unreadable file", "", str(error), -1, "", "train")])
    print_report(report, console)
    for line in splits["train"].notes if splits else ():
        console.print(line, soft_wrap=True, markup=False)
    stage1 = recipe.model.start_from.stage1_recipe
    if stage1 is not None:
        console.print(f"the data of Stage 1 was not checked; run lora-llava check {stage1}")
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        write_json(json_file, report.as_dict())
    if fix and splits:
        written = _fix(splits, report, console)
        if copies is not None:
            copies.update(written)
    return report


def _check_json_file(file: Path) -> None:
    """Check that an existing file to overwrite is an earlier report."""
    if not file.exists():
        return
    try:
        earlier = {"rows", "errors", "warnings"} <= set(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError):
        earlier = False
    if not earlier:
        raise UserError(f"--json: {file} exists and is not a report of a check; choose another file")


def _read(recipe: Recipe) -> tuple[dict[str, OpenSplit], CheckReport]:
    science = recipe.data.format == "scienceqa"
    if (
        not science or recipe.data.splits.test is not None
    ):  # even without an evaluation, test rows must not be trained on
        recipe = recipe.model_copy(update={"evaluation": recipe.evaluation or EvaluationSection()})
    model = plan_model(recipe.model)
    check_continued(recipe)
    tokenizer, processor, template = build_run_processor(recipe, model)
    check_continued_processor(recipe, processor)
    seen = earlier_rows(recipe, processor, template, model.config, show_progress)
    splits = encode_splits(recipe, tokenizer, template, show_progress, seen=seen)
    images = _inspect(splits)
    splits = {
        name: with_image_tokens(split, tokenizer, model.config, _sizes(split, images)) for name, split in splits.items()
    }
    checked = checked_sources(splits, images)
    report = check_sources(
        checked,
        {name: run_policy(recipe, name) for name in splits},
        leaks_are_errors=not science,
        with_images=sources_with_images(recipe, splits),
    )
    report.warnings += _remarks(splits)
    report.warnings += _over_positions(checked, int(model.config.text_config.max_position_embeddings))
    counts = train_answers(splits["train"], recipe.seed) if recipe.data.format == "conversations" else None
    add_balance(report, counts)
    return splits, report


def _remarks(splits: dict[str, OpenSplit]) -> Iterator[Finding]:
    """Yield remarks on files that were read in an unusual way."""
    seen: set[str] = set()
    for split, found in splits.items():
        for source in found.sources:
            if source.name not in seen:
                seen.add(source.name)
                for kind, remark in source.remarks():
                    yield Finding(kind, "", remark, -1, source.name, split)


def _over_positions(sources: Sequence[CheckedSource], positions: int) -> Iterator[Finding]:
    """Yield findings on test rows, which `data.max_length` does not limit, that are longer than the model can read."""
    for source in sources:
        lengths = source.table.lengths()[source.rows]
        for place in np.flatnonzero(lengths > positions) if source.split == "test" else ():
            row = int(source.rows[place])
            advice = tiles_advice(source.table, row, positions)
            message = (
                f"it has {lengths[place]:,} tokens, over the language model's {positions:,} positions; leave it out"
            )
            yield source.finding("over the positions", row, message + advice)


def _inspect(splits: dict[str, OpenSplit]) -> dict[int, dict[str, ImageFacts]]:
    """Inspect the images of every source, once for a source that two splits share."""
    found: dict[int, dict[str, ImageFacts]] = {}
    for split in splits.values():
        for source, table in zip(split.sources, split.tables, strict=True):
            if id(source) not in found:
                names = dict.fromkeys(name for row in range(len(table)) for name in table.images(row))
                bar = partial(show_progress, f"images of {source.name}")
                found[id(source)] = inspect_images(source.images, names, image_cache(source), bar)
    return found


def _sizes(split: OpenSplit, images: dict[int, dict[str, ImageFacts]]) -> dict[ImageName, tuple[int, int]]:
    """Return the sizes of the images of a split, by their names in its rows."""
    several = len(split.sources) > 1
    return {
        ImageId(number, name) if several else name: facts.size
        for number, source in enumerate(split.sources)
        for name, facts in images[id(source)].items()
    }


def print_report(report: CheckReport, console: Console) -> None:
    """Print figures by split, then every kind of finding with its count and an example."""
    for name, figures in report.splits.items():
        share = 100 * figures["trained_tokens"] / max(1, figures["tokens"])
        rows, sources = number_of(figures["rows"], "row"), figures["sources"]
        bare = figures["sound_rows"] - figures["rows_with_images"]
        without = f", {bare:,} without" if bare and figures["rows_with_images"] else ""
        of = f" from {len(sources)} sources" if len(sources) > 1 else ""
        console.print(
            Text(
                f"{name}: {rows}{of}, {figures['rows_with_images']:,} with images{without}; "
                f"{figures['tokens']:,} tokens, {share:.0f}% trained; longest {figures['longest']:,}"
            )
        )
        if figures["over_limit_rows"]:
            over = number_of(figures["over_limit_rows"], "row")
            limit = f"  over the limit: {over}, by {figures['over_limit_tokens']:,} tokens"
            if "over_limit_max_tiles" in figures:
                fitting = figures["over_limit_rows_that_fit"]
                limit += f"; {fitting:,} of them fit with model.max_tiles={figures['over_limit_max_tiles']}"
            console.print(Text(limit))
        console.print(_histogram(figures["histogram"], "rows"))
        if "image_tokens" in figures:
            images = sum(each["images"] for each in figures["image_tokens"])
            console.print(Text(f"  tokens of {number_of(images, 'image')}, each counted once:"))
            console.print(_histogram(figures["image_tokens"], "images"))
    if saved := report.splits.get("train", {}).get("answers"):
        for line in balance_lines(read_majority(saved)):
            console.print(line)
    if report.errors or report.warnings:
        console.print(_findings(report))
    errors, warnings = len(report.errors), len(report.warnings)
    harmless = "ready to train" if warnings else "nothing is wrong"
    fixable = all(finding.number >= 0 for finding in report.errors)
    advice = "fix the errors, or leave their rows out with --fix" if fixable else "fix the errors"
    verdict = advice if errors else harmless
    counts = [f"{count:,} {word}{'s' * (count != 1)}" for count, word in ((errors, "error"), (warnings, "warning"))]
    console.print(f"{number_of(report.rows, 'row')} checked: {', '.join(counts)}; {verdict}")


def _histogram(bins: list[dict[str, Any]], counted: str) -> Text:
    most = max((each[counted] for each in bins), default=0)
    text = Text()
    for each in bins:
        count = each[counted]
        if text or count:  # start at the shortest row
            bar = "█" * (round(_BAR * count / most) or min(1, count))
            text.append(f"  {each['from']:>6,} to {each['to'] - 1:>6,} tokens  ")
            text.append(bar, style="green")
            text.append(f" {count:,}\n")
    text.rstrip()
    return text


def _findings(report: CheckReport) -> RichTable:
    table = RichTable(title="Findings", title_justify="left")
    for name in ("", "kind", "found", "for example"):
        table.add_column(name, justify="right" if name == "found" else "left", overflow="fold")
    for level, style, findings in (("error", "bold red", report.errors), ("warning", "yellow", report.warnings)):
        kinds: dict[str, list[Finding]] = {}
        for finding in findings:
            kinds.setdefault(finding.kind, []).append(finding)
        for kind, found in sorted(kinds.items(), key=lambda item: -len(item[1])):
            first = found[0]
            where = f"{first.split} {first.name}: " if first.name else ""
            example = escape_hidden(f"{where}{first.message}")
            table.add_row(Text(level, style=style), kind, f"{len(found):,}", Text(example))
    return table


def _fix(splits: dict[str, OpenSplit], report: CheckReport, console: Console) -> dict[Path, Path]:
    """Write a copy of each file of rows without rows that have errors or are repeated; return the first of each."""
    copies: dict[Path, Path] = {}
    dropped: dict[str, set[int]] = {}
    for finding in [*report.errors, *(f for f in report.warnings if f.dropped or f.kind == DUPLICATE)]:
        if finding.number >= 0:
            dropped.setdefault(finding.source, set()).add(finding.number)
    sources = {source.name: source for split in splits.values() for source in split.sources}
    totals = {
        source.name: len(table)
        for split in splits.values()
        for source, table in zip(split.sources, split.tables, strict=True)
    }
    for name, source in sources.items():
        rows = dropped.get(name, set())
        if not rows:
            continue
        if len(rows) >= totals[name]:
            raise UserError(f"--fix: no row of {name} would be left; fix it by hand")
        if not source.files:
            raise UserError(
                f"--fix: {name} is not a local file of rows; set data.on_bad_row=drop data.on_bad_image=drop instead"
            )
        for file, target, count, left_out in write_set_without(source.files, rows):
            console.print(
                f"--fix: {target}: {number_of(count, 'row')}, {left_out:,} left out; {file} is unchanged",
                soft_wrap=True,
            )
            if file == source.files[0]:
                copies[file] = target
    if not dropped:
        console.print("--fix: nothing to leave out; no copy was written")
    return copies
