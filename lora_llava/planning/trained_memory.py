"""The memory of what a recipe trains besides the language model's adapters and the projector, and of EVA's ranks."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import LlavaConfig

from lora_llava.model.families.tower_families import tower_of
from lora_llava.model.initialization import EVA_RHO
from lora_llava.model.vision_adapters import used_layers
from lora_llava.recipe.schema import LoraSection, VisionLoraSection


def vision_shapes(config: LlavaConfig) -> dict[str, tuple[int, int]]:
    """Return input and output sizes of a tower layer's linear layers (transformers, models/clip/modeling_clip.py)."""
    hidden, inner = config.vision_config.hidden_size, config.vision_config.intermediate_size
    square = dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj"), (hidden, hidden))
    return {**square, "fc1": (hidden, inner), "fc2": (inner, hidden)}


def vision_lora_parameters(config: LlavaConfig, lora: LoraSection | None) -> int:
    """Return the number of parameters of the adapters on the tower."""
    if lora is None or lora.vision is None:
        return 0
    shapes = vision_shapes(config)
    per_layer = sum(lora.vision.r * sum(shapes[name]) + lora.dora * shapes[name][1] for name in lora.vision.targets)
    return int(used_layers(config) * per_layer)


def tower_bytes(config: LlavaConfig, lora: LoraSection | None, images: int, size: int, *, cuda: bool) -> int:
    """Return the bytes that autograd keeps of a tower with adapters, for all images of a row.

    Args:
        config: Configuration of the LLaVA.
        lora: The adapters.
        images: Images of the row.
        size: Bytes of the compute dtype.
        cuda: Whether it runs on a GPU.
    """
    if lora is None or lora.vision is None:
        return 0
    vision = config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2 + tower_of(config).class_tokens
    hidden, inner = vision.hidden_size, vision.intermediate_size
    # Inputs of two norms; q, k, v and attention's output; fc1's output and its sigmoid; log-sum-exp and norms' numbers.
    per_token = size * (6 * hidden + 2 * inner) + 4 * vision.num_attention_heads + 16
    per_token += _adapter_inputs(config, lora.vision, lora.dropout, size, cuda=cuda)
    return int(used_layers(config) * per_token * tokens * images)


def _adapter_inputs(config: LlavaConfig, vision: VisionLoraSection, dropout: float, size: int, *, cuda: bool) -> int:
    """Return the bytes per token and layer that adapters keep: float32 inputs, each its own, and what A returns."""
    inputs: dict[str, int] = {name: shape[0] for name, shape in vision_shapes(config).items() if name in vision.targets}
    between = 4 * vision.r * len(inputs)
    if dropout:
        return int((4 + (1 if cuda else 4)) * sum(inputs.values()) + between)
    if size == 4:  # in float32 the three inputs of attention are one, and attention's output is counted already
        inputs = {"q_proj" if name in ("k_proj", "v_proj") else name: width for name, width in inputs.items()}
        inputs.pop("out_proj", None)
    return int(4 * sum(inputs.values()) + between)


def largest_eva_parameters(shapes: Sequence[tuple[int, int]], lora: LoraSection) -> int:
    """Return the most parameters that EVA's ranks can have: the budget on the largest layers, as far as they may.

    Args:
        shapes: Input and output sizes of every linear layer with an adapter.
        lora: The adapters.
    """
    budget, found = lora.r * len(shapes), 0
    most = round(EVA_RHO * lora.r)
    for size in sorted(map(sum, shapes), reverse=True):
        ranks = min(budget, most)
        budget -= ranks
        found += ranks * size
    return found


def vocabulary_parameters(config: LlavaConfig) -> int:
    """Return the number of parameters of the embeddings, or of the head."""
    return int(config.text_config.vocab_size * config.text_config.hidden_size)


def full_parameters(config: LlavaConfig, lora: LoraSection | None) -> int:
    """Return the number of parameters of embeddings and head that are trained in full."""
    return len(lora.modules_to_save) * vocabulary_parameters(config) if lora is not None else 0
