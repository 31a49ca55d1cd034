"""Tower and projector as GGUF: llama.cpp's `mmproj` with projector type `mlp`, which is LLaVA 1.5's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from transformers import LlavaConfig

from lora_llava.core.errors import UserError
from lora_llava.model.families.tower_families import describe_images
from lora_llava.model.weights.tensor_files import LazyTensor
from lora_llava.publishing.gguf.gguf_source import GgufSource, image_settings

ClassToken = Literal["last", "first", "none"]
"""Where llama.cpp puts CLIP's class token. Since May 2025 it comes last, with positions and the choice of rows still
made for one that comes first (https://github.com/ggml-org/llama.cpp/issues/25814)."""

_TOWER, _PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."
_HEAD = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "pre_layrnorm.weight": "v.pre_ln.weight",
    "pre_layrnorm.bias": "v.pre_ln.bias",
}
_BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
"""CLIP's names in transformers, and llama.cpp's (tools/mtmd/clip-impl.h)."""


def feature_layer(config: LlavaConfig) -> int:
    """Return the number of tower layers that are computed for the features.

    Raises:
        UserError: For features of several layers.
    """
    layer, layers = config.vision_feature_layer, config.vision_config.num_hidden_layers
    if not isinstance(layer, int):
        raise UserError(f"--format gguf: vision_feature_layer {layer}; the writer knows features of one layer")
    return layer if layer >= 0 else layers + 1 + layer


def check_mmproj(source: GgufSource, square_images: bool) -> None:
    """Check that llama.cpp computes the same features from the same pixels.

    Args:
        source: The model.
        square_images: Whether only square images will be sent, which are neither padded nor cropped.

    Raises:
        UserError: If it does not.
    """
    vision, config = source.config.vision_config, source.config
    if vision.model_type != "clip_vision_model":
        raise UserError(
            f"--format gguf: the tower is a {vision.model_type!r} model; the writer knows clip_vision_model"
        )
    if vision.hidden_act not in ("quick_gelu", "gelu"):
        raise UserError(
            f"--format gguf: tower with hidden_act {vision.hidden_act!r}; llama.cpp's has quick_gelu or gelu"
        )
    if config.vision_feature_select_strategy != "default":
        strategy = config.vision_feature_select_strategy
        raise UserError(
            f"--format gguf: vision_feature_select_strategy {strategy!r}; llama.cpp always drops the class token"
        )
    if config.projector_hidden_act not in ("gelu", "linear"):
        raise UserError(
            f"--format gguf: projector_hidden_act {config.projector_hidden_act!r}; llama.cpp's projector has gelu"
        )
    if not 1 <= feature_layer(config) <= vision.num_hidden_layers:
        raise UserError(
            f"--format gguf: vision_feature_layer {config.vision_feature_layer} is not a layer of the tower"
        )
    _check_pixels(source, square_images)


def _check_pixels(source: GgufSource, square_images: bool) -> None:
    settings, size = image_settings(source.folder), source.config.vision_config.image_size
    resample = settings.get("resample")
    if resample != 3:
        raise UserError(f"--format gguf: image processor with resample {resample}; llama.cpp resizes bicubically (3)")
    crop = settings.get("crop_size")
    sides = set(crop.values()) if isinstance(crop, dict) else {crop}
    if settings.get("do_center_crop") and sides != {size}:
        raise UserError(f"--format gguf: image processor with crop_size {crop}; llama.cpp uses the tower's {size}")
    if not settings.get("do_pad") and not square_images:
        raise UserError(
            f"--format gguf: this model's images are not padded ({describe_images(settings)}), and llama.cpp pads them "
            "to a square; add --square-images if you send square images only, train with data.image_aspect: pad, or "
            "serve the merged folder with vLLM"
        )


def add_mmproj_metadata(writer: Any, source: GgufSource, name: str) -> None:
    """Write the metadata of tower and projector.

    llama.cpp computes the layers before the last block that it finds, or as many as `feature_layer` names in versions
    that read it; the file agrees with both.

    Args:
        writer: A `gguf.GGUFWriter`.
        source: The model.
        name: The model's name.
    """
    vision, settings = source.config.vision_config, image_settings(source.folder)
    layers = feature_layer(source.config)
    writer.add_type("mmproj")
    writer.add_name(name)
    writer.add_clip_has_vision_encoder(True)
    writer.add_bool("clip.has_text_encoder", False)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_projection_dim(source.config.text_config.hidden_size)
    writer.add_vision_block_count(stored_blocks(source.config))
    writer.add_array("clip.vision.feature_layer", [layers])
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_image_mean([float(value) for value in settings["image_mean"]])  # type: ignore[attr-defined]
    writer.add_vision_image_std([float(value) for value in settings["image_std"]])  # type: ignore[attr-defined]
    writer.add_vision_use_gelu(vision.hidden_act == "gelu")


def stored_blocks(config: LlavaConfig) -> int:
    """Return the number of tower layers that are stored: those computed, and the next one if there is one."""
    return min(feature_layer(config) + 1, int(config.vision_config.num_hidden_layers))


def mmproj_tensors(source: GgufSource, class_token: ClassToken) -> list[LazyTensor]:
    """List the tensors of tower and projector as llama.cpp expects them, without later layers and the last norm.

    Args:
        source: The model.
        class_token: `first` writes the tower as it is, for a llama.cpp that puts the token first. `last` moves the
            positions for one that puts it last: all features are exact, but the first patch's is missing and the class
            token's comes after the others. `none` leaves the class token out, which every version computes equally.
    """
    return [*_embeddings(source, class_token), *_blocks(source), *_projector(source)]


def _patches_of(load: Callable[[], torch.Tensor]) -> torch.Tensor:
    return load()[1:]


def _class_last(load: Callable[[], torch.Tensor]) -> torch.Tensor:
    return load().roll(-1, 0)


def _embeddings(source: GgufSource, class_token: ClassToken) -> Iterator[LazyTensor]:
    for name, new in _HEAD.items():
        tensor = replace(source.tensors[f"{_TOWER}{name}"], name=new)
        if new == "v.class_embd" and class_token == "none":
            continue
        if new == "v.position_embd.weight" and class_token == "none":
            tensor = replace(
                tensor, shape=(tensor.shape[0] - 1, tensor.shape[1]), load=partial(_patches_of, tensor.load)
            )
        if new == "v.position_embd.weight" and class_token == "last":
            tensor = replace(tensor, load=partial(_class_last, tensor.load))
        yield tensor


def _blocks(source: GgufSource) -> Iterator[LazyTensor]:
    config = source.config
    names = dict(_BLOCK)
    if config.vision_config.intermediate_size == config.vision_config.hidden_size:
        # llama.cpp takes equal sizes for an old file with the two names swapped, and swaps them (clip.cpp)
        names |= {"mlp.fc1": "ffn_down", "mlp.fc2": "ffn_up"}
    for block in range(stored_blocks(config)):
        for name, new in names.items():
            for end in ("weight", "bias"):
                tensor = source.tensors[f"{_TOWER}encoder.layers.{block}.{name}.{end}"]
                yield replace(tensor, name=f"v.blk.{block}.{new}.{end}")


def _projector(source: GgufSource) -> Iterator[LazyTensor]:
    """List the projector's tensors; a linear one is written as an MLP.

    llama.cpp always applies GELU between the two matrices. gelu(x) - gelu(-x) = x, so (W, -W) followed by (V, -V)
    computes V W x.
    """
    linear = source.config.projector_hidden_act == "linear"
    first, second = (source.tensors[f"{_PROJECTOR}linear_{i}.weight"] for i in (1, 2))
    rows, columns = first.shape
    wide = 2 * rows if linear else rows

    def mirrored(load: Callable[[], torch.Tensor], axis: int) -> Callable[[], torch.Tensor]:
        return (lambda: torch.cat([load(), -load()], axis)) if linear else load

    yield LazyTensor("mm.0.weight", (wide, columns), mirrored(first.load, 0))
    yield LazyTensor("mm.0.bias", (wide,), mirrored(_bias(source, 1, rows), 0))
    yield LazyTensor("mm.2.weight", (second.shape[0], wide), mirrored(second.load, 1))
    yield LazyTensor("mm.2.bias", (second.shape[0],), _bias(source, 2, second.shape[0]))


def _bias(source: GgufSource, index: int, size: int) -> Callable[[], torch.Tensor]:
    """Return the loader of a bias; zeros if the projector has none, since llama.cpp needs one."""
    tensor = source.tensors.get(f"{_PROJECTOR}linear_{index}.bias")
    return tensor.load if tensor is not None else lambda: torch.zeros(size)
