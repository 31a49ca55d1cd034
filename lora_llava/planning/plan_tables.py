"""Print the plan of a run on the terminal."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import constants
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from lora_llava.core.errors import UserError
from lora_llava.data.encode import IGNORE_INDEX
from lora_llava.model.families.language_families import outside_the_table
from lora_llava.model.families.llava_kinds import llava_class
from lora_llava.planning.answer_memory import AnswerPlan, plan_answers
from lora_llava.planning.fit import host_weights, recomputation, resolve_optimizer
from lora_llava.planning.memory import GIB, Step
from lora_llava.planning.memory_budget import memory_budget
from lora_llava.planning.run_plan import RunPlan
from lora_llava.recipe import Recipe
from lora_llava.splits.split_rows import Split

BF16_BYTES = 2


def print_data(plan: RunPlan, console: Console) -> None:
    """Print rows used and dropped, tokens and steps."""
    recipe = plan.recipe
    paths = ", ".join(dict.fromkeys(source.path for source in recipe.data.train_sources()))
    table = RichTable(title=f"Stage {recipe.stage}: {recipe.data.format} from {paths}", title_justify="left")
    for name in ("split", "rows", "used", "dropped", "cut", "tokens", "trained tokens", "longest"):
        table.add_column(name, justify="left" if name in ("split", "dropped") else "right")
    for name, split in plan.splits.items():
        report = split.report
        dropped = ", ".join(f"{count} {reason}" for reason, count in report.dropped.items()) or "0"
        share = f"{report.supervised_tokens:,} ({100 * report.supervised_tokens / max(1, report.tokens):.0f}%)"
        table.add_row(
            name,
            f"{report.rows:,}",
            f"{report.used:,}",
            dropped,
            f"{report.truncated:,}",
            f"{report.tokens:,}",
            share,
            f"{report.longest:,}",
        )
    console.print(table)
    _print_sources(plan, console)
    for name, split in plan.splits.items():
        for line in _reading(name, split):
            console.print(line, soft_wrap=True, markup=False)
        fixes = ", ".join(f"{count:,} {what}" for what, count in split.report.repaired.items())
        if fixes:
            console.print(f"{name}: fixed while reading: {fixes}; `lora-llava check` names the rows", soft_wrap=True)
    for line in (*plan.notes, *plan.sharing):
        console.print(line, soft_wrap=True, markup=False)
    console.print(_steps(plan))


def _reading(name: str, split: Split) -> Iterator[str]:
    """Yield remarks on a split: rows without an image among others, and unusual files."""
    bare = int((split.rows.image_counts() == 0).sum())
    if 0 < bare < len(split.rows):
        yield f"{name}: {bare:,} of {len(split.rows):,} rows have no image"
    for source in split.sources:
        if len(source.files) > 1:
            yield f"{name}: {source.name} is {len(source.files):,} files, from {source.files[0].name} on"
        yield from (f"{name}: {remark}" for _, remark in source.remarks())


def _print_sources(plan: RunPlan, console: Console) -> None:
    """Print the rows per epoch of each source."""
    train = plan.splits["train"]
    if len(train.sources) < 2:
        return
    table = RichTable(title="Sources", title_justify="left")
    for name in ("source", "rows", "rows per epoch", "share"):
        table.add_column(name, justify="left" if name == "source" else "right")
    used = train.report.sources
    available = np.bincount(train.rows.places[:, 0], minlength=len(train.sources))
    for source, count in zip(train.sources, available, strict=True):
        share = 100 * used[source.name] / max(1, sum(used.values()))
        table.add_row(source.name, f"{count:,}", f"{used[source.name]:,}", f"{share:.1f}%")
    console.print(table)


def _steps(plan: RunPlan) -> str:
    training, order = plan.recipe.training, plan.order
    batch, accumulation = training.batch_size, order.accumulation
    if training.max_tokens_per_row is None:
        return f"{order.steps:,} steps of {batch * accumulation} samples ({batch} x {accumulation})"
    full = order.tokens_per_row / training.max_tokens_per_row
    return (
        f"{order.steps:,} steps of {accumulation} rows of up to {training.max_tokens_per_row:,} tokens, "
        f"{100 * full:.1f}% full: {order.samples_per_step:.1f} samples per step on average"
    )


def print_memory(recipe: Recipe, step: Step, longest: int, console: Console) -> None:
    """Print the memory of a step by part and of answers, and how much is recomputed.

    Args:
        recipe: The recipe.
        step: The run's step.
        longest: Tokens of the longest question.
        console: Prints them.
    """
    table = RichTable(title=f"Memory of a step: a row of up to {step.tokens:,} tokens", title_justify="left")
    table.add_column("part")
    table.add_column("", justify="right")
    for name, size in step.parts().items():
        if size:
            table.add_row(name, _size(size))
    table.add_section()
    table.add_row("peak", _size(step.peak))
    answers = plan_answers(recipe, step, longest)
    if answers is not None:
        table.add_section()
        table.add_row(_answering(recipe, answers), _size(answers.peak))
    console.print(table)
    if answers is not None and not answers.fits:
        console.print(
            "warning: an answer does not fit; lower evaluation.max_new_tokens or data.max_length", soft_wrap=True
        )
    if (warning := outside_the_table(step.config.text_config)) is not None:
        console.print(f"warning: {warning}", soft_wrap=True)
    budget, source = memory_budget(recipe)
    console.print(
        f"{recomputation(step)}; {budget / GIB:.1f} GiB available ({source}); optimizer "
        f"{resolve_optimizer(recipe, cuda=step.cuda)}"
    )
    if line := host_weights(recipe, step):
        console.print(line, soft_wrap=True)


def _answering(recipe: Recipe, answers: AnswerPlan) -> str:
    evaluation, count = recipe.evaluation, answers.questions
    assert evaluation is not None
    fewer = f", of evaluation.batch_size {evaluation.batch_size}" if count < evaluation.batch_size else ""
    questions = f"{count} question{'s' * (count > 1)} at once{fewer}"
    return f"answers before and after training: {questions}"


def _size(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.1f} MiB"


def print_downloads(plan: RunPlan, cache: Path, console: Console) -> None:
    """Print what would be downloaded and written, and check the disk space.

    Raises:
        UserError: If there is not enough.
    """
    downloads = plan.model.downloads
    total = sum(download.missing_bytes for download in downloads)
    for download in downloads:
        console.print(f"download {download.name}: {download.missing_bytes / 1e9:.1f} GB")
    if not downloads:
        console.print("download: nothing")
    assembled = plan.recipe.model.start_from.llava is None
    base = BF16_BYTES * total_parameters(plan) if assembled else 0
    _check_disk(Path(constants.HF_HUB_CACHE), total, "the Hub's cache", console)
    _check_disk(cache, base, "the base model", console)


def total_parameters(plan: RunPlan) -> int:
    """Return the number of parameters of the LLaVA, from its config."""
    import torch

    with torch.device("meta"):
        return sum(p.numel() for p in llava_class(plan.model.config)(plan.model.config).parameters())


def _check_disk(folder: Path, needed: int, what: str, console: Console) -> None:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    console.print(f"disk: {what} needs up to {needed / 1e9:.2f} GB in {folder}; {free / 1e9:.0f} GB are free")
    if needed > free:
        raise UserError(
            f"{folder}: {what} needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; free some, or set "
            "HF_HOME or LORA_LLAVA_CACHE to another disk"
        )


TRAINED_PARTS = {
    "lora": "LoRA",
    "vision_lora": "LoRA on the vision tower",
    "image_newline": "image newline",
    "new_tokens": "rows of new tokens",
    "embed_tokens": "embeddings",
    "lm_head": "head",
}
"""Parts that a run can train besides the projector, as `RunPlan.trained_parameters` names them."""


def print_parameters(plan: RunPlan, console: Console) -> None:
    """Print the number of trained parameters."""
    counts = plan.trained_parameters
    parts = [f"projector {counts['projector']:,}"]
    parts += [f"{TRAINED_PARTS[part]} {count:,}" for part, count in counts.items() if count and part in TRAINED_PARTS]
    console.print(f"trains {' + '.join(parts)} parameters of {total_parameters(plan):,}")
    if plan.recipe.lora is not None and plan.recipe.lora.init == "eva":
        console.print("eva distributes the ranks when training begins; the memory is planned for the largest layers")


def print_sample(plan: RunPlan, console: Console) -> None:
    """Print one training row with its trained tokens marked."""
    console.print("one sample, its trained tokens marked:")
    console.print(mark_sample(plan.splits["train"].rows[0], plan.tokenizer, plan.model.config.image_token_index))


def mark_sample(row: dict[str, Any], tokenizer: Any, image_token_id: int) -> Text:
    """Return a row's text with trained tokens in reverse video, and in brackets for terminals without colour.

    Args:
        row: With `input_ids` and `labels`.
        tokenizer: Decodes the tokens.
        image_token_id: A run of these is shown as a count.

    Returns:
        Styled text.
    """
    text = Text()
    runs: list[tuple[bool, list[int]]] = []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        trained = label != IGNORE_INDEX
        if not runs or runs[-1][0] != trained:
            runs.append((trained, []))
        runs[-1][1].append(token)
    images = row["input_ids"].count(image_token_id)
    for trained, ids in runs:
        written = tokenizer.decode([i for n, i in enumerate(ids) if i != image_token_id or ids[n - 1 : n] != [i]])
        written = written.replace("<image>", f"<image x {images}>")
        text.append(f"⟦{written}⟧" if trained else written, style="bold reverse" if trained else "")
    return text


def print_freeze_plan(plan: list[dict[str, Any]], console: Console) -> None:
    """Print the freeze plan: module, dtype, trained or frozen, parameters."""
    table = RichTable(title="Freeze plan", title_justify="left")
    for name in ("module", "dtype", "", "parameters"):
        table.add_column(name, justify="right" if name == "parameters" else "left")
    for row in plan:
        state = Text("trained", style="bold") if row["trained"] else "frozen"
        table.add_row(row["module"], row["dtype"], state, f"{row['parameters']:,}")
    console.print(table)
