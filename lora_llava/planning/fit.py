"""Before a run: what a step takes, whether it fits, how many layers are recomputed for it, and how long it will be."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import LlavaConfig

from lora_llava.core.errors import UserError
from lora_llava.data.encoded import EncodedRows
from lora_llava.distributed.ranks import this_rank
from lora_llava.distributed.sharding import is_sharded
from lora_llava.model.loading import resolve_dtype
from lora_llava.planning.memory import CUDA_CONTEXT, GIB, PROCESS, Step, fit_step, smallest, usable
from lora_llava.recipe import Recipe

CARDS_GB = (8, 12, 16, 24)
CARD_OVERHEAD = 0.3 * GIB
"""What a driver and a desktop take of a card (a card of 8 GB then leaves torch 7.2 GiB beside CUDA's context)."""
EIGHT_BIT_FROM_R = 64


@dataclass(frozen=True)
class Extremes:
    """The heaviest forward pass of a run.

    Attributes:
        tokens: Padding included.
        trained_tokens: Most of any.
        images: Most of any.
    """

    tokens: int
    trained_tokens: int
    images: int


def measure_rows(rows: Sequence[Sequence[int]], samples: EncodedRows, *, padded: bool) -> Extremes:
    """Find the heaviest forward pass.

    Args:
        rows: Sample indices of each.
        samples: The samples.
        padded: Whether every sample of a row is as long as its longest.
    """
    rows = [row for row in rows if row]  # a rank's share of the last step may be nothing
    lengths, trained, images = (
        values.tolist() for values in (samples.lengths, samples.supervised, samples.image_counts())
    )
    return Extremes(
        max(len(row) * max(lengths[i] for i in row) if padded else sum(lengths[i] for i in row) for row in rows),
        max(sum(trained[i] for i in row) for row in rows),
        max(sum(images[i] for i in row) for row in rows),
    )


def resolve_optimizer(recipe: Recipe, *, cuda: bool) -> str:
    """transformers' name of a run's optimiser.

    Raises:
        UserError: Where the recipe asks for one that needs CUDA, and there is none.
    """
    asked = recipe.training.optimizer
    if asked == "paged_adamw_8bit" and not cuda:
        raise UserError("training.optimizer is paged_adamw_8bit, which needs CUDA; set adamw_torch, or auto")
    sharded = is_sharded()  # 8-bit states of shares of weights have not been tried
    large = recipe.lora is not None and recipe.lora.r >= EIGHT_BIT_FROM_R
    if asked == "auto":
        return "paged_adamw_8bit" if large and cuda and not sharded else "adamw_torch"
    return asked


def build_step(recipe: Recipe, config: LlavaConfig, extremes: Extremes, *, cuda: bool) -> Step:
    """A recipe's step, nothing recomputed.

    Args:
        recipe: The recipe.
        config: Of the LLaVA.
        extremes: Of its rows.
        cuda: Whether it is to run on a GPU.
    """
    auto = torch.bfloat16 if cuda else torch.float32
    dtype = auto if recipe.model.dtype == "auto" else resolve_dtype(recipe.model.dtype)
    return Step(
        config=config,
        quantization=recipe.model.quantization,
        dtype_bytes=dtype.itemsize,
        lora=recipe.lora,
        optimizer_bytes=2 if "8bit" in resolve_optimizer(recipe, cuda=cuda) else 8,
        tokens=extremes.tokens,
        trained_tokens=extremes.trained_tokens,
        images=extremes.images,
        cached_features=recipe.training.vision_cache != "off",
        cuda=cuda,
        ranks=this_rank()[1] if is_sharded() else 1,
    )


def memory_budget(recipe: Recipe) -> tuple[int, str]:
    """Bytes that a step may take here, and where the figure is from, in words."""
    asked = recipe.training.memory_gb
    if asked != "auto":
        return int(asked * GIB), f"training.memory_gb {asked:g} GiB"
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] + CUDA_CONTEXT, "free on the GPU"
    return psutil.virtual_memory().available + PROCESS, "free memory"


def choose_checkpointing(recipe: Recipe, step: Step) -> Step:
    """The step as it is to run: as the recipe says, or with the least recomputation that fits.

    Raises:
        UserError: Where it does not fit, with what it needs at least and a mend.
    """
    budget, source = memory_budget(recipe)
    chosen = as_asked(recipe, step, budget)
    if chosen is None:
        asked = recipe.training.gradient_checkpointing
        needed = smallest(step) if asked == "auto" else replace(step, checkpointed=step.layers if asked else 0).peak
        fitting = (words for words, leaner in leaner_steps(recipe, step) if fit_step(leaner, budget))
        mend = next(fitting, None)
        raise UserError(
            f"a step needs {needed / GIB:.1f} GiB or more, and {budget / GIB:.1f} GiB are there ({source}); "
            + (f"set {mend}" if mend else "no setting of this recipe fits there: take a smaller language model")
        )
    return chosen


def as_asked(recipe: Recipe, step: Step, budget: int) -> Step | None:
    """The step with the recipe's own word on recomputation, or None where that does not fit the budget."""
    asked = recipe.training.gradient_checkpointing
    if asked == "auto":
        return fit_step(step, budget)
    fixed = replace(step, checkpointed=step.layers if asked else 0)
    return fixed if fixed.peak <= usable(step, budget) else None


def leaner_steps(recipe: Recipe, step: Step) -> list[tuple[str, Step]]:
    """Ways to need less, each with those before it, the cheapest first: the settings in words, and the step."""
    ways: list[tuple[str, dict[str, Any]]] = []
    if recipe.training.gradient_checkpointing != "auto":
        ways.append(("training.gradient_checkpointing=auto", {}))
    if recipe.model.quantization == "none":
        ways.append(("model.quantization=nf4", {"quantization": "nf4"}))
    if not step.cached_features:
        ways.append(("training.vision_cache=disk", {"cached_features": True}))
    if step.cuda and step.optimizer_bytes > 2:
        ways.append(("training.optimizer=paged_adamw_8bit", {"optimizer_bytes": 2}))
    longest = min(step.tokens, recipe.data.max_length)
    for tokens in (4096, 2048, 1024):
        if longest <= tokens < step.tokens:
            shorter = {"tokens": tokens, "trained_tokens": min(tokens, step.trained_tokens)}
            batch = "" if recipe.training.batch_size == 1 else " training.batch_size=1"
            ways.append((f"training.max_tokens_per_row={tokens}{batch}", shorter))
    if recipe.lora is not None and recipe.lora.r > 16:
        smaller = recipe.lora.model_copy(update={"r": 16})
        eight_bit = "" if step.optimizer_bytes > 2 or not step.cuda else " training.optimizer=paged_adamw_8bit"
        ways.append((f"lora.r=16{eight_bit}", {"lora": smaller}))
    steps: list[tuple[str, Step]] = []
    words: list[str] = []
    current = step
    for word, change in ways:
        key = word.split("=")[0]
        words = [*(other for other in words if not other.startswith(key)), word]
        current = replace(current, **change)
        steps.append((" ".join(words), current))
    return steps


def what_fits(recipe: Recipe, step: Step) -> list[tuple[int, str]]:
    """For cards of common sizes, what a recipe needs to run there, in words."""
    on_card = build_step(recipe, step.config, Extremes(step.tokens, step.trained_tokens, step.images), cuda=True)
    lines = []
    for size in CARDS_GB:
        budget = int(size * GIB - CARD_OVERHEAD)
        own = as_asked(recipe, on_card, budget)
        ways = [
            ("as it is", own),
            *((words, fit_step(leaner, budget)) for words, leaner in leaner_steps(recipe, on_card)),
        ]
        words, fit = next(((words, fit) for words, fit in ways if fit is not None), ("", None))
        lines.append((size, "nothing fits" if fit is None else f"{words}; {recomputation(fit)}; {_gib(fit.peak)}"))
    return lines


def recomputation(step: Step) -> str:
    """How much is recomputed, in words."""
    if not step.checkpointed:
        return "no layer recomputed"
    told = f"{step.checkpointed} of {step.layers} layers recomputed"
    return told + (", their inputs in the host's memory" if step.offloaded else "")


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def device_in_words() -> str:
    """What would train here."""
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        return f"{torch.cuda.get_device_name()}, {memory / GIB:.1f} GiB"
    if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        if torch.version.cuda is None:
            return "CUDA card present, but this torch is the CPU build; install torch for CUDA (pytorch.org)"
        return "CUDA card present, but torch cannot use it; see `nvidia-smi` and the driver's version"
    return "no GPU: it would run on the CPU"
