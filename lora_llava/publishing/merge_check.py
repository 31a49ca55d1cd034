"""Verify a merge: compare logits and answers with base + adapter, check the tolerance, and print the report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import GenerationConfig

from lora_llava.core.device import free_memory
from lora_llava.core.errors import ReportedError, UserError
from lora_llava.core.progress import progress_bar
from lora_llava.inference.load import load_processor
from lora_llava.model.families.llava_kinds import read_llava_config
from lora_llava.model.loading import check_bitsandbytes
from lora_llava.model.weights.tensor_files import lazy_tensors
from lora_llava.publishing.adapter_tensors import read_adapter
from lora_llava.publishing.merge_source import MergeSource
from lora_llava.publishing.merged_weights import BaseKind
from lora_llava.publishing.proof import (
    Progress,
    Prompts,
    adapted_model,
    compare,
    encode_samples,
    greedy_answers,
    last_logits,
    merged_model,
    stays_in_memory,
)
from lora_llava.publishing.proof_prompts import sample_prompts
from lora_llava.recipe import load_recipe
from lora_llava.recipe.io import RECIPE_FILE

MAX_NEW_TOKENS = 24
FP32_TOLERANCE = 1e-4
NOISE_FACTOR = 2
ADAPTER, NF4_ADAPTER = "adapter_on_bf16_base", "adapter_on_nf4_base"


class ProofError(ReportedError):
    """The merged model differs from base + adapter."""


@dataclass(frozen=True)
class MergedModel:
    """The merged model to verify.

    Attributes:
        folder: The merged folder.
        adapter: An adapter for it, or None.
        kind: The kind of base it was merged into.
        dtype: The dtype of its weights, in which all models are compared.
    """

    folder: Path
    adapter: Path | None
    kind: BaseKind
    dtype: torch.dtype


_OTHER_BLOCKS = 6
"""Vision tower, two layers of the projector, embeddings, norm and head."""


@contextmanager
def _bar(description: str, source: MergeSource, passes: int) -> Iterator[Progress]:
    """Show a progress bar over blocks; it ends early if answers stop early."""
    total = passes * (source.config.text_config.num_hidden_layers + _OTHER_BLOCKS)
    with progress_bar(desc=description, total=total, unit="block", leave=False) as bar:
        yield lambda block: bar.update() and None


@dataclass(frozen=True)
class Questions:
    """The prompts to verify with.

    Attributes:
        prompts: The encoded prompts.
        with_image: Number of prompts with an image.
        where: A phrase on their origin.
        stop_ids: Tokens that end an answer.
    """

    prompts: Prompts
    with_image: int
    where: str
    stop_ids: list[int]


def prepare_questions(source: MergeSource, per_kind: int) -> Questions:
    """Draw and encode the sample prompts, early enough that missing files are reported before the merge.

    Args:
        source: The run and its base.
        per_kind: Number of prompts of each kind, with and without an image.

    Raises:
        UserError: If the run's processor, recipe or generation config is missing or damaged.
    """
    file = source.run / RECIPE_FILE
    samples, where = sample_prompts(load_recipe(file) if file.is_file() else None, per_kind)
    try:
        eos = GenerationConfig.from_pretrained(source.run).eos_token_id
    except (OSError, ValueError) as error:
        raise UserError(
            f"{source.run}: its generation_config.json cannot be loaded ({str(error).splitlines()[0]})"
        ) from None
    processor = load_processor(source.run)
    stop_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    with_image = sum(sample.image is not None for sample in samples)
    return Questions(encode_samples(samples, processor), with_image, where, stop_ids)


def prove(source: MergeSource, merged: MergedModel, questions: Questions, console: Console) -> dict[str, Any]:
    """Compare a merged model with base + adapter on sample prompts.

    Args:
        source: The run and its base.
        merged: The merged model.
        questions: From `prepare_questions`.
        console: Prints the origin of the prompts.

    Returns:
        The report: the differences from both kinds of base + adapter, the tolerance and the noise it is based on.

    Raises:
        ProofError: If the difference exceeds the tolerance.
    """
    prompts, count = questions.prompts, len(questions.prompts.ids)
    console.print(f"verifying on {count} prompts, {questions.with_image} with an image: {questions.where}")
    keep = stays_in_memory(source.tensors, merged.dtype)
    reference = _reference_of(merged.kind)
    answers, logits, noise, effect = _adapter_outputs(source, merged, questions, keep)
    free_memory()
    ours = _merged_logits(source, merged, prompts, answers, keep)
    free_memory()
    deltas = {reference: compare(logits, ours, answers)}
    if source.adapter.layers:
        deltas |= _other_delta(source, merged, prompts, answers, ours, keep, console)
    tolerance = max(FP32_TOLERANCE if merged.dtype == torch.float32 else 0.0, NOISE_FACTOR * noise)
    report = {
        "merged_into": merged.kind,
        "dtype": str(merged.dtype).removeprefix("torch."),
        "checked_against": reference,
        "tolerance": tolerance,
        "batch_size_noise": noise,
        "adapter_effect": effect,
        **{name: asdict(deltas[name]) if name in deltas else None for name in (ADAPTER, NF4_ADAPTER)},
        "prompts": count,
        "prompts_with_image": questions.with_image,
        "prompts_from": questions.where,
        "base": source.record["base"],
    }
    _check_tolerance(report, merged.dtype, console)
    return report


def _reference_of(kind: BaseKind) -> str:
    return NF4_ADAPTER if kind == "nf4" else ADAPTER


def _adapter_outputs(
    source: MergeSource, merged: MergedModel, questions: Questions, keep: bool
) -> tuple[list[list[int]], list[torch.Tensor], float, float]:
    """Return answers and logits of base + adapter, and the effects of batch size and of the adapter on logits."""
    prompts, nf4_from = questions.prompts, source.dtype if merged.kind == "nf4" else None
    with _bar("verify: base + adapter", source, MAX_NEW_TOKENS + len(prompts.ids) + 2) as progress:
        model = adapted_model(
            source.config,
            source.tensors,
            source.adapter,
            merged.dtype,
            nf4_from=nf4_from,
            keep=keep,
            progress=progress,
        )
        answers = greedy_answers(model, prompts, MAX_NEW_TOKENS, questions.stop_ids)
        logits = last_logits(model, prompts, answers, len(answers))
        one_by_one = last_logits(model, prompts, answers, 1)
        without = last_logits(model, prompts, answers, len(answers), with_adapter=False)
    noise = compare(logits, one_by_one, answers).max_logit_difference
    return answers, logits, noise, compare(logits, without, answers).max_logit_difference


def _merged_logits(
    source: MergeSource, merged: MergedModel, prompts: Prompts, answers: list[list[int]], keep: bool
) -> list[torch.Tensor]:
    config = read_llava_config(merged.folder)
    with _bar("verify: merged model", source, 1) as progress:
        if merged.adapter is None:
            model = merged_model(config, merged.folder, merged.dtype, keep=keep, progress=progress)
        else:
            adapter = read_adapter(merged.adapter)
            tensors = lazy_tensors(merged.folder)
            model = adapted_model(config, tensors, adapter, merged.dtype, keep=keep, progress=progress)
        return last_logits(model, prompts, answers, len(answers))


def _other_delta(
    source: MergeSource,
    merged: MergedModel,
    prompts: Prompts,
    answers: list[list[int]],
    ours: list[torch.Tensor],
    keep: bool,
    console: Console,
) -> dict[str, Any]:
    """Compare with the adapter on the other kind of base, which shows the effect of quantisation."""
    nf4 = merged.kind == "bf16"
    try:
        check_bitsandbytes()
    except UserError as error:
        console.print(f"comparison with the NF4 base skipped: {error}")
        return {}
    with _bar(f"verify: adapter on the {'NF4' if nf4 else 'bf16'} base", source, 1) as progress:
        model = adapted_model(
            source.config,
            source.tensors,
            source.adapter,
            merged.dtype,
            nf4_from=source.dtype if nf4 else None,
            keep=keep,
            progress=progress,
        )
        theirs = last_logits(model, prompts, answers, len(answers))
    return {_reference_of("nf4" if nf4 else "bf16"): compare(theirs, ours, answers)}


def _check_tolerance(report: dict[str, Any], dtype: torch.dtype, console: Console) -> None:
    delta = report[report["checked_against"]]
    over = not delta["max_logit_difference"] <= report["tolerance"]  # also true for NaN
    unequal = dtype == torch.float32 and delta["greedy_equal"] < delta["prompts"]
    if over or unequal:
        print_report(report, console)
        what = (
            f"logits differ by {delta['max_logit_difference']:.3g}, tolerance {report['tolerance']:.3g}"
            if over
            else f"{delta['prompts'] - delta['greedy_equal']} of {delta['prompts']} greedy answers differ"
        )
        fix = "" if dtype == torch.float32 else "; use --dtype float32 to store it without rounding"
        raise ProofError(f"the merged model differs from base + adapter: {what}; nothing was kept{fix}")


def print_report(report: dict[str, Any], console: Console) -> None:
    """Print a report."""
    table = Table(title="The merged model compared with", title_justify="left")
    for name in ("", "largest logit difference", "mean", "greedy answers equal"):
        table.add_column(name, justify="right" if name else "left")
    titles = {ADAPTER: "base in bf16 + adapter", NF4_ADAPTER: "base in NF4 + adapter"}
    for name, title in titles.items():
        delta = report[name]
        if delta is not None:
            checked = " (checked against the tolerance)" if name == report["checked_against"] else ""
            table.add_row(
                title + checked,
                f"{delta['max_logit_difference']:.3g}",
                f"{delta['mean_logit_difference']:.3g}",
                f"{delta['greedy_equal']} of {delta['prompts']}",
            )
    console.print(table)
    console.print(
        f"tolerance {report['tolerance']:.3g} in {report['dtype']}; batch size alone changes a logit by up to "
        f"{report['batch_size_noise']:.3g}, the adapter by up to {report['adapter_effect']:.3g}"
    )
    checked = report[report["checked_against"]]
    if checked["greedy_equal"] < checked["prompts"]:
        console.print(
            f"{checked['prompts'] - checked['greedy_equal']} greedy answers differ: between two nearly equally likely "
            f"tokens, rounding to {report['dtype']} decides; run lora-llava evaluate to see whether scores change"
        )
