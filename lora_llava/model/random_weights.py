"""Build a LLaVA of any shape with random weights on the device, for measurements."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlavaConfig

from lora_llava.model.loading import Quantization, keep_autograd
from lora_llava.model.vision import accept_features
from lora_llava.model.weights.streaming import build_empty

_STD = 0.02
"""transformers' `initializer_range` of Llama and CLIP."""


def build_random_llava(
    config: LlavaConfig,
    *,
    quantization: Quantization,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    with_tower: bool = True,
) -> Any:
    """Build a random model matrix by matrix, so that only one is unquantized at a time.

    Args:
        config: The model's configuration.
        quantization: `nf4` for the language model's linear layers, as in `load_base`.
        dtype: Dtype of everything else, and of computation.
        device: Device of the weights.
        seed: Seed of the weights.
        with_tower: Include the vision tower; without it the model accepts image features as its `pixel_values`.

    Returns:
        The frozen model in eval mode.
    """
    model = build_empty(config, device)
    if not with_tower:
        accept_features(model)
    if config.text_config.tie_word_embeddings:
        model.lm_head.weight = model.get_input_embeddings().weight
    generator = torch.Generator(device).manual_seed(seed)

    def draw(shape: torch.Size) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0, _STD, generator=generator)

    for name, module in list(model.named_modules()):
        if quantization == "nf4" and isinstance(module, nn.Linear) and name.startswith("model.language_model."):
            model.set_submodule(name, _quantized(draw(module.weight.shape), dtype, module.bias))
    drawn: dict[nn.Parameter, nn.Parameter] = {}  # as modules may share one
    for module in model.modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.is_meta:
                continue
            if parameter not in drawn:
                scale = leaf == "weight" and parameter.ndim == 1  # of a norm
                value = torch.ones(parameter.shape, dtype=dtype, device=device) if scale else draw(parameter.shape)
                drawn[parameter] = nn.Parameter(value, requires_grad=False)
            module._parameters[leaf] = drawn[parameter]
    model.is_loaded_in_4bit = quantization == "nf4"  # peft and trl recognize a quantized model by it
    keep_autograd(model)
    return model.eval()


def _quantized(weight: torch.Tensor, dtype: torch.dtype, bias: torch.Tensor | None) -> nn.Module:
    import bitsandbytes as bnb

    size_out, size_in = weight.shape
    layer: nn.Module = bnb.nn.Linear4bit(
        size_in,
        size_out,
        bias=bias is not None,
        compute_dtype=dtype,
        quant_type="nf4",
        compress_statistics=True,
        device="meta",
    )
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
    ).to(weight.device)
    return layer
