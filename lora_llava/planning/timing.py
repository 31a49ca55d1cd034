"""Estimate the time of a run, measured on this machine if possible, else from published rates."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from transformers import LlavaConfig

from lora_llava.core.device import free_memory, is_out_of_memory
from lora_llava.model.adapters import add_adapters
from lora_llava.model.families.tower_families import image_tokens, tiling_of
from lora_llava.model.fast_path.attention import resolve_attention, use_flash_varlen
from lora_llava.model.fast_path.lean import make_lean
from lora_llava.model.fast_path.trained_loss import labelled_loss
from lora_llava.model.loading import autocast, default_device, resolve_dtype
from lora_llava.model.random_weights import build_random_llava
from lora_llava.planning.memory import Step
from lora_llava.planning.run_plan import run_lora_config
from lora_llava.recipe import Recipe

PUBLISHED_TOKENS_PER_SECOND = {"RTX 4090": 2330, "RTX 3090": 1198}
"""Llama-2-7B QLoRA, derived from the fsdp_qlora benchmark (github.com/AnswerDotAI/fsdp_qlora)."""
_PUBLISHED_PARAMETERS = 6.48e9
"""Parameters of Llama-2-7B's linear layers, which do nearly all of the work."""
_CPU_SECONDS_ALLOWED = 3.0
_CPU_FLOPS = 5e10
"""A rough guess, enough to skip timing a 7B model on a CPU."""
_REPEATS = 3


def time_row(recipe: Recipe, step: Step) -> float | None:
    """Measure the seconds of one optimizer step on a full row, from one and two layers with random weights.

    Args:
        recipe: The recipe.
        step: From `choose_checkpointing`.

    Returns:
        Seconds, with the head but without vision tower and data loading; None if measuring takes too long or needs too
        much memory.
    """
    parameters = sum(a * b for a, b in step.linear_shapes.values())
    head = step.config.text_config.vocab_size * step.config.text_config.hidden_size
    work = 6 * step.tokens * (3 * parameters + 2 * head) * (_REPEATS + 1)
    if not torch.cuda.is_available() and work / _CPU_FLOPS > _CPU_SECONDS_ALLOWED:
        return None
    try:
        one, two = (_time_layers(recipe, step, count) for count in (1, 2))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        free_memory()
        return None
    return step_seconds(one, two, step)


def step_seconds(one: float, two: float, step: Step) -> float:
    """Return the seconds of a step, from those of the same step with one layer and with two, none recomputed.

    A recomputed layer takes half as long again. The weights are frozen. Per token and weight, a forward pass takes 2
    operations (y = W x) and a backward pass 2 (dx = W^T dy). The 2 of a weight's own gradient (dW = dy x^T) are needed
    for LoRA's weights only: at r 16, 0.6% of those of a 7B layer. Recomputation adds a forward pass: (2 + 2 + 2) /
    (2 + 2) = 1.5. If all weights trained, it would be (2 + 4 + 2) / (2 + 4) = 1.33.

    Args:
        one: Seconds with one layer.
        two: Seconds with two layers.
        step: The step, with its number of layers and of recomputed ones.
    """
    layer = max(0.0, two - one)
    # The next layer's weights are copied while a layer is computed: forward, or again and backward.
    waits = sum(max(0.0, step.copy_seconds - computed) for computed in (layer / 2, layer))
    return one + layer * (step.layers - 1 + step.checkpointed / 2) + waits * step.copies / 2


def _time_layers(recipe: Recipe, step: Step, layers: int) -> float:
    device, dtype = default_device(), resolve_dtype(recipe.model.dtype)
    config = copy.deepcopy(step.config)
    config.text_config.num_hidden_layers = layers
    if kinds := getattr(config.text_config, "layer_types", None):
        config.text_config.layer_types = kinds[:layers]
    model = build_random_llava(
        config, quantization=recipe.model.quantization, dtype=dtype, device=device, with_tower=False
    )
    if resolve_attention(recipe.model.attention, dtype, config.text_config)[0]:
        use_flash_varlen(model)
    if recipe.lora is not None:  # the tower is not timed
        recipe = recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"vision": None})})
    peft_model = add_adapters(model, run_lora_config(recipe, config)).train()
    make_lean(model.model.language_model)
    batch = _full_row(step, recipe, device)
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-6)
    seconds = []
    for _ in range(_REPEATS + 1):  # the first is a warm-up
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        with autocast(device, dtype):
            loss = labelled_loss(peft_model, batch)[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _full_row(step: Step, recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """Return a row of samples of equal length, with as many images and trained tokens as the heaviest."""
    image, tiles, size = _image(step.config)
    samples = max(1, step.images // tiles, step.tokens // recipe.data.max_length)
    length = max(image + 2, step.tokens // samples)
    images = min(samples, step.images // tiles)
    trained = max(1, min(length - 1 - (image if images else 0), step.trained_tokens // samples))
    ids = torch.full((samples, length), 3)
    ids[:images, 1 : image + 1] = step.config.image_token_index
    labels = torch.full_like(ids, -100)
    labels[:, length - trained :] = 3
    ends = torch.arange(0, samples * length + 1, length, dtype=torch.int32)
    batch: dict[str, Any] = {
        "input_ids": ids.view(1, -1),
        "labels": labels.view(1, -1),
        "position_ids": torch.arange(length).repeat(samples).view(1, -1),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": length,
        "max_length_k": length,
    }
    if images:
        layers = step.config.vision_feature_layer
        tower = step.config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))
        batch["pixel_values"] = torch.randn(images * tiles, image_tokens(step.config), tower)
        if tiling_of(step.config) is not None:
            batch["image_sizes"] = torch.tensor([size] * images)
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def _image(config: LlavaConfig) -> tuple[int, int, tuple[int, int]]:
    """Return tokens, tiles and size of an image: for a model with tiles, of one that fills the largest canvas."""
    tiling = tiling_of(config)
    if tiling is None:
        return image_tokens(config), 1, (config.vision_config.image_size,) * 2
    size = max(tiling.grid, key=tiling.tokens)
    return tiling.tokens(size), tiling.tiles(size), size


def published_hours(step: Step, tokens: int) -> dict[str, float]:
    """Return the hours of training on known GPUs, from published rates scaled by the model's size.

    Args:
        step: The step.
        tokens: Tokens of the run, without padding.
    """
    size = step.layers * sum(a * b for a, b in step.linear_shapes.values()) / _PUBLISHED_PARAMETERS
    return {card: tokens * size / rate / 3600 for card, rate in PUBLISHED_TOKENS_PER_SECOND.items()}
