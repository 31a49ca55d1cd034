"""The proof of a merge: what is compared with what, how far apart it may be, and how it is told."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import GenerationConfig, LlavaConfig

from lora_llava.core.errors import ToldError, UserError
from lora_llava.model.loading import check_bitsandbytes
from lora_llava.model.weights.tensor_files import lazy_tensors
from lora_llava.publishing.adapter_tensors import read_adapter
from lora_llava.publishing.merge_source import Source
from lora_llava.publishing.merged_weights import BaseKind
from lora_llava.publishing.proof import (
    Progress,
    Prompts,
    adapted_model,
    compare,
    encode_samples,
    greedy_answers,
    last_logits,
    stays_in_memory,
    whole_model,
)
from lora_llava.publishing.proof_prompts import load_processor, sample_prompts
from lora_llava.recipe import load_recipe
from lora_llava.runs.directory import RECIPE_FILE

MAX_NEW_TOKENS = 24
FP32_TOLERANCE = 1e-4
NOISE_FACTOR = 2
ADAPTER, NF4_ADAPTER = "adapter_on_bf16_base", "adapter_on_nf4_base"


class ProofError(ToldError):
    """The merged model is not what base + adapter is."""


@dataclass(frozen=True)
class MergedModel:
    """What is to be proven.

    Attributes:
        folder: The merged folder.
        adapter: An adapter that goes with it, or None.
        kind: What it was merged into.
        dtype: What it stores, and what all models of the proof compute in.
    """

    folder: Path
    adapter: Path | None
    kind: BaseKind
    dtype: torch.dtype


_OTHER_BLOCKS = 6
"""Vision tower, the projector's two layers, embeddings, norm and head."""


@contextmanager
def _bar(description: str, source: Source, passes: int) -> Iterator[Progress]:
    """A progress bar over blocks; answers that stop early end it early."""
    total = passes * (source.config.text_config.num_hidden_layers + _OTHER_BLOCKS)
    with tqdm(desc=description, total=total, unit="block", dynamic_ncols=True, leave=False) as bar:
        yield lambda block: bar.update() and None


def _give_back() -> None:
    """Free the last model before the next is read: hooks hold it in a cycle."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Questions:
    """What the proof asks.

    Attributes:
        prompts: Encoded.
        with_image: How many have one.
        where: Where they are from.
        stop_ids: Tokens that end an answer.
    """

    prompts: Prompts
    with_image: int
    where: str
    stop_ids: list[int]


def prepare_questions(source: Source, per_kind: int) -> Questions:
    """Draw and encode the sample prompts: all that can fail for want of a file does so here.

    Args:
        source: What is merged.
        per_kind: Prompts of each kind, with and without an image.

    Raises:
        UserError: Where the run's processor, recipe or generation config is missing or damaged.
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


def prove(source: Source, merged: MergedModel, questions: Questions, console: Console) -> dict[str, Any]:
    """Compare a merged model with base + adapter on sample prompts.

    Args:
        source: What was merged.
        merged: The result.
        questions: From `prepare_questions`.
        console: Told where the prompts are from.

    Returns:
        The report: both deltas, the tolerance and what it stands on.

    Raises:
        ProofError: Over the tolerance.
    """
    prompts, count = questions.prompts, len(questions.prompts.ids)
    console.print(f"proof: {count} prompts, {questions.with_image} with an image; {questions.where}")
    keep = stays_in_memory(source.tensors, merged.dtype)
    reference = _reference_of(merged.kind)
    answers, logits, noise, effect = _ask_adapter(source, merged, questions, keep)
    _give_back()
    ours = _ask_merged(source, merged, prompts, answers, keep)
    _give_back()
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
    _hold(report, merged.dtype, console)
    return report


def _reference_of(kind: BaseKind) -> str:
    return NF4_ADAPTER if kind == "nf4" else ADAPTER


def _ask_adapter(
    source: Source, merged: MergedModel, questions: Questions, keep: bool
) -> tuple[list[list[int]], list[torch.Tensor], float, float]:
    """Answers and logits of base + adapter, what batch size alone changes in them, and what the adapter does."""
    prompts, nf4_from = questions.prompts, source.dtype if merged.kind == "nf4" else None
    with _bar("proof: base + adapter", source, MAX_NEW_TOKENS + len(prompts.ids) + 2) as progress:
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


def _ask_merged(
    source: Source, merged: MergedModel, prompts: Prompts, answers: list[list[int]], keep: bool
) -> list[torch.Tensor]:
    config = LlavaConfig.from_pretrained(merged.folder)
    with _bar("proof: merged", source, 1) as progress:
        if merged.adapter is None:
            model = whole_model(config, merged.folder, merged.dtype, keep=keep, progress=progress)
        else:
            adapter = read_adapter(merged.adapter)
            tensors = lazy_tensors(merged.folder)
            model = adapted_model(config, tensors, adapter, merged.dtype, keep=keep, progress=progress)
        return last_logits(model, prompts, answers, len(answers))


def _other_delta(
    source: Source,
    merged: MergedModel,
    prompts: Prompts,
    answers: list[list[int]],
    ours: list[torch.Tensor],
    keep: bool,
    console: Console,
) -> dict[str, Any]:
    """The delta against the adapter on the other kind of base: what quantisation costs."""
    nf4 = merged.kind == "bf16"
    try:
        check_bitsandbytes()
    except UserError as error:
        console.print(f"not compared with the NF4 base: {error}")
        return {}
    with _bar(f"proof: adapter on the {'NF4' if nf4 else 'bf16'} base", source, 1) as progress:
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


def _hold(report: dict[str, Any], dtype: torch.dtype, console: Console) -> None:
    delta = report[report["checked_against"]]
    over = not delta["max_logit_difference"] <= report["tolerance"]  # a NaN is over
    unequal = dtype == torch.float32 and delta["greedy_equal"] < delta["prompts"]
    if over or unequal:
        tell(report, console)
        what = (
            f"logits differ by {delta['max_logit_difference']:.3g}, tolerance {report['tolerance']:.3g}"
            if over
            else f"{delta['prompts'] - delta['greedy_equal']} of {delta['prompts']} greedy answers differ"
        )
        mend = "" if dtype == torch.float32 else "; --dtype float32 stores it without rounding"
        raise ProofError(f"the merged model is not base + adapter: {what}; nothing was kept{mend}")


def tell(report: dict[str, Any], console: Console) -> None:
    """Print a report."""
    table = Table(title="The merged model against", title_justify="left")
    for name in ("", "largest logit difference", "mean", "greedy answers equal"):
        table.add_column(name, justify="right" if name else "left")
    titles = {ADAPTER: "base in bf16 + adapter", NF4_ADAPTER: "base in NF4 + adapter"}
    for name, title in titles.items():
        delta = report[name]
        if delta is not None:
            held = " (held to the tolerance)" if name == report["checked_against"] else ""
            table.add_row(
                title + held,
                f"{delta['max_logit_difference']:.3g}",
                f"{delta['mean_logit_difference']:.3g}",
                f"{delta['greedy_equal']} of {delta['prompts']}",
            )
    console.print(table)
    console.print(
        f"tolerance {report['tolerance']:.3g} in {report['dtype']}; batch size alone changes a logit by up to "
        f"{report['batch_size_noise']:.3g}, the adapter by up to {report['adapter_effect']:.3g}"
    )
    held = report[report["checked_against"]]
    if held["greedy_equal"] < held["prompts"]:
        console.print(
            f"{held['prompts'] - held['greedy_equal']} greedy answers differ: rounding to {report['dtype']} decides "
            "where two tokens are as likely; lora-llava evaluate tells whether it matters"
        )
