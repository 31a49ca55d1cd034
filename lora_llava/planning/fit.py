"""Fit a training step into memory: its size, the recomputed layers, and the settings that need less."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import LlavaConfig

from lora_llava.core.errors import UserError
from lora_llava.data.encoded import EncodedRows
from lora_llava.data.packed_rows.shared_prefixes import SharedPrefixes
from lora_llava.distributed.ranks import this_rank
from lora_llava.distributed.sharding import is_sharded
from lora_llava.model.fast_path.attention import is_by_sample
from lora_llava.model.loading import resolve_dtype
from lora_llava.planning.memory import GIB, Step, fit_step, smallest, usable
from lora_llava.planning.memory_budget import check_budget, memory_budget, other_gpu
from lora_llava.recipe import Recipe

CARDS_GB = (8, 12, 16, 24)
CARD_OVERHEAD = 0.3 * GIB
"""Memory used by the driver and a desktop (on a card of 8 GB, 7.2 GiB are left besides CUDA's context)."""
EIGHT_BIT_FROM_R = 64
_ROUNDED = 256
"""What the tokens of a suggested row are rounded up to."""


@dataclass(frozen=True)
class Extremes:
    """The heaviest forward pass of a run.

    Attributes:
        tokens: Most tokens of a pass, padding included.
        trained_tokens: Most trained tokens of a pass.
        images: Most tiles of the images of a pass: for a model without tiles, most images.
        keys: Most keys that attention reads in a pass; None is `tokens`.
        fewer_tiles: For a model with tiles, each smaller limit of tiles and the tokens of the longest sample with it.
    """

    tokens: int
    trained_tokens: int
    images: int
    keys: int | None = None
    fewer_tiles: tuple[tuple[int, int], ...] = ()


def measure_rows(
    rows: Sequence[Sequence[int]], samples: EncodedRows, *, padded: bool, shared: SharedPrefixes | None = None
) -> Extremes:
    """Find the heaviest forward pass.

    Args:
        rows: Sample indices of each pass.
        samples: The samples.
        padded: Whether the samples of a row are padded to the longest.
        shared: The prefixes that samples share.
    """
    rows = [row for row in rows if row]  # a rank's rows in the last step may be empty
    lengths, trained, images = (
        values.tolist() for values in (samples.lengths, samples.supervised, samples.tile_counts())
    )
    most_trained = max(sum(trained[i] for i in row) for row in rows)
    if shared is not None:
        return Extremes(
            max(shared.tokens(row, lengths) for row in rows),
            most_trained,
            max(shared.tiles(row, images) for row in rows),
            max(shared.keys(row, lengths) for row in rows),
            _with_fewer_tiles(samples),
        )
    return Extremes(
        max(len(row) * max(lengths[i] for i in row) if padded else sum(lengths[i] for i in row) for row in rows),
        most_trained,
        max(sum(images[i] for i in row) for row in rows),
        fewer_tiles=_with_fewer_tiles(samples),
    )


def _with_fewer_tiles(samples: EncodedRows) -> tuple[tuple[int, int], ...]:
    """Return each smaller limit of tiles, largest first, and the tokens of the longest sample with it."""
    found = []
    for most in next((table.tiled.limits[1:] for table in samples.tables if table.tiled is not None), []):
        tables = []
        for table in samples.tables:
            assert table.image_id is not None  # rows of a split have image tokens
            assert table.tiled is not None  # as those of every source of a model with tiles
            tables.append(table.with_image_tokens(table.image_id, table.tiled.with_most(most)))
        lengths = EncodedRows(tables, samples.places, max_length=samples.max_length).lengths
        found.append((most, int(lengths.max())))
    return tuple(found)


def resolve_optimizer(recipe: Recipe, *, cuda: bool) -> str:
    """Return transformers' name of a run's optimizer.

    Raises:
        UserError: If the recipe names one that needs CUDA, and there is no GPU.
    """
    requested = recipe.training.optimizer
    if requested == "paged_adamw_8bit" and not cuda:
        raise UserError("training.optimizer is paged_adamw_8bit, which needs CUDA; set adamw_torch, or auto")
    sharded = is_sharded()  # 8-bit states of sharded weights have not been tested
    large = recipe.lora is not None and recipe.lora.r >= EIGHT_BIT_FROM_R
    if requested == "auto":
        on_gpu = "paged_adamw_8bit" if large else "adamw_torch_fused"
        return on_gpu if cuda and not sharded else "adamw_torch"
    return requested


def build_step(recipe: Recipe, config: LlavaConfig, extremes: Extremes, *, cuda: bool) -> Step:
    """Return the training step of a recipe, without recomputation.

    Args:
        recipe: The recipe.
        config: Configuration of the LLaVA.
        extremes: The heaviest forward pass.
        cuda: Whether it runs on a GPU.
    """
    other = cuda and not torch.cuda.is_available()  # planned for a GPU that is not here
    dtype = torch.bfloat16 if other and recipe.model.dtype == "auto" else resolve_dtype(recipe.model.dtype)
    return Step(
        config=config,
        quantization=recipe.model.quantization,
        dtype_bytes=dtype.itemsize,
        lora=recipe.lora,
        optimizer_bytes=2 if "8bit" in resolve_optimizer(recipe, cuda=cuda) else 8,
        tokens=extremes.tokens,
        trained_tokens=extremes.trained_tokens,
        images=extremes.images,
        keys=extremes.keys,
        cached_features=recipe.training.vision_cache != "off",
        cuda=cuda,
        ranks=this_rank()[1] if is_sharded() else 1,
        new_tokens=len(recipe.model.new_tokens),
        fewer_tiles=extremes.fewer_tiles,
        by_sample=cuda and torch.cuda.is_available() and is_by_sample(dtype),
    )


def choose_checkpointing(recipe: Recipe, step: Step) -> Step:
    """Return the step with the recomputation set in the recipe, or the least that fits.

    Raises:
        UserError: If it does not fit, with the memory it needs and a fix, or if `training.memory_gb` is not free.
    """
    if step.cuda == torch.cuda.is_available():  # else it is planned for another machine
        check_budget(recipe)
    budget, source = memory_budget(recipe)
    chosen = as_requested(recipe, step, budget)
    if chosen is None:
        setting = recipe.training.gradient_checkpointing
        needed = smallest(step) if setting == "auto" else replace(step, checkpointed=step.layers if setting else 0).peak
        fitting = (text for text, leaner in leaner_steps(recipe, step) if fit_step(leaner, budget))
        fix = next(fitting, None)
        raise UserError(
            f"a step needs {needed / GIB:.1f} GiB or more, and {budget / GIB:.1f} GiB are available ({source}); "
            + (f"set {fix}" if fix else "no setting of this recipe fits: use a smaller language model")
            + other_gpu(needed)
        )
    return chosen


def as_requested(recipe: Recipe, step: Step, budget: int) -> Step | None:
    """Return the step with the recomputation set in the recipe; None if that does not fit the budget."""
    setting = recipe.training.gradient_checkpointing
    if setting == "auto":
        return fit_step(step, budget)
    fixed = replace(step, checkpointed=step.layers if setting else 0)
    return fixed if fixed.peak <= usable(step, budget) else None


def leaner_steps(recipe: Recipe, step: Step) -> list[tuple[str, Step]]:
    """List settings that need less memory, cheapest first, each including those before it, and their steps."""
    ways: list[tuple[str, dict[str, Any]]] = []
    if recipe.training.gradient_checkpointing != "auto":
        ways.append(("training.gradient_checkpointing=auto", {}))
    if recipe.model.quantization == "none":
        ways.append(("model.quantization=nf4", {"quantization": "nf4"}))
    if not step.cached_features and (recipe.lora is None or recipe.lora.vision is None):
        ways.append(("training.vision_cache=disk", {"cached_features": True}))
    if step.cuda and step.optimizer_bytes > 2:
        ways.append(("training.optimizer=paged_adamw_8bit", {"optimizer_bytes": 2}))
    ways += _shorter_rows(recipe, step)
    lora = recipe.lora
    if lora is not None and lora.vision is not None:
        lora = lora.model_copy(update={"vision": None})
        ways.append(("lora.vision=null", {"lora": lora}))
    if lora is not None and lora.modules_to_save:
        lora = lora.model_copy(update={"modules_to_save": ()})
        ways.append(("lora.modules_to_save=[]", {"lora": lora}))
    if lora is not None and lora.r > 16:
        smaller = lora.model_copy(update={"r": 16})
        eight_bit = "" if step.optimizer_bytes > 2 or not step.cuda else " training.optimizer=paged_adamw_8bit"
        ways.append((f"lora.r=16{eight_bit}", {"lora": smaller}))
    steps: list[tuple[str, Step]] = []
    settings: list[str] = []
    current = step
    for setting, change in ways:
        key = setting.split("=")[0]
        settings = [*(other for other in settings if not other.startswith(key)), setting]
        current = replace(current, **change)
        steps.append((" ".join(settings), current))
    return steps


def _shorter_rows(recipe: Recipe, step: Step) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield settings with rows of fewer tokens, and last those that need fewer tiles for it.

    The longest sample with fewer tiles is that of the rows that were read, which `plan` may have sampled.
    """
    batch = "" if recipe.training.batch_size == 1 else " training.batch_size=1"
    longest, now = min(step.tokens, recipe.data.max_length), step.tokens
    limits: list[tuple[int | None, int]] = [(None, tokens) for tokens in (4096, 2048, 1024) if longest <= tokens]
    if recipe.model.start_from.run is None:  # a run keeps its tiles
        limits += [(most, -(-sample // _ROUNDED) * _ROUNDED) for most, sample in step.fewer_tiles]
    for most, tokens in limits:
        if tokens >= now:
            continue
        now = tokens
        if most is not None:
            yield f"model.max_tiles={most}", {}
        shorter = {"tokens": tokens, "trained_tokens": min(tokens, step.trained_tokens)}
        yield f"training.max_tokens_per_row={tokens}{batch}", shorter


def what_fits(recipe: Recipe, step: Step) -> list[tuple[int, str]]:
    """Return, for common GPU sizes, a description of the settings with which a recipe fits."""
    extremes = Extremes(step.tokens, step.trained_tokens, step.images, fewer_tiles=step.fewer_tiles)
    on_card = build_step(recipe, step.config, extremes, cuda=True)
    lines = []
    for size in CARDS_GB:
        budget = int(size * GIB - CARD_OVERHEAD)
        unchanged = as_requested(recipe, on_card, budget)
        leaner = leaner_steps(recipe, on_card)
        ways = [
            *([("as it is", unchanged)] if unchanged is None or not unchanged.host_layers else []),
            *((text, fit_step(each, budget, in_host=False)) for text, each in leaner),
            ("as it is", unchanged),
            *((text, fit_step(each, budget)) for text, each in leaner),
        ]
        text, fit = next(((text, fit) for text, fit in ways if fit is not None), ("", None))
        lines.append((size, "nothing fits" if fit is None else f"{text}; {recomputation(fit)}; {_gib(fit.peak)}"))
    return lines


def recomputation(step: Step) -> str:
    """Describe how much is recomputed."""
    if not step.checkpointed:
        return "no layer recomputed"
    text = f"{step.checkpointed} of {step.layers} layers recomputed"
    text += ", their inputs in host memory" if step.offloaded else ""
    return text + (f", weights of {step.host_layers} too" if step.host_layers else "")


def host_weights(recipe: Recipe, step: Step) -> str | None:
    """Describe the weights in host memory, what they cost, and what avoids them; None if there are none."""
    if not step.host_layers:
        return None
    budget, _ = memory_budget(recipe)
    without = (text for text, leaner in leaner_steps(recipe, step) if fit_step(leaner, budget, in_host=False))
    setting = next(without, None)
    return (
        f"weights of {step.host_layers} of {step.layers} layers in host memory: {_gib(step.host_savings)} less, at "
        f"most {step.copies * step.copy_seconds:.2f} s a row at PCIe 4 x16 (computed)"
        + (f"; set {setting} to keep them on the GPU" if setting else "")
    )


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
