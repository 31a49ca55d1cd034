"""The tensors of a merged checkpoint: the base's, with LoRA added and what was trained in full replaced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch

from lora_llava.core.errors import UserError
from lora_llava.model.nf4_round_trip import nf4_round_trip
from lora_llava.model.weights.names import canonical_name
from lora_llava.model.weights.tensor_files import LazyTensor
from lora_llava.publishing.adapter_tensors import Adapter, LoraLayer, is_tower, merge_weight

BaseKind = Literal["bf16", "nf4"]


def merged_tensors(
    base: list[LazyTensor],
    adapter: Adapter,
    *,
    kind: BaseKind = "bf16",
    with_lora: bool = True,
    dtype: torch.dtype = torch.float32,
    nf4_from: torch.dtype = torch.float32,
) -> list[LazyTensor]:
    """List the tensors of the merged checkpoint, lazily read, with the base's names and order.

    Args:
        base: The base's tensors.
        adapter: The adapter to merge.
        kind: `bf16` adds to the base's weights as stored, `nf4` to the NF4 values of the language model's matrices.
        with_lora: Whether to add the language model's LoRA; if not, only the vision tower's is added, and what was
            trained in full is replaced.
        dtype: The dtype of merged weights.
        nf4_from: The dtype that NF4 values are quantised from.

    Raises:
        UserError: If the adapter does not fit the base.
    """
    found = list(_merged(base, adapter, nf4_from if kind == "nf4" else None, with_lora, dtype))
    names = {canonical_name(tensor.name) for tensor in base}
    for name in [*(f"{layer}.weight" for layer in adapter.layers), *adapter.saved, *adapter.rows]:
        if name not in names:
            raise UserError(
                f"{adapter.folder}: the adapter has {name}, but its base does not; it belongs to another base"
            )
    return found


def _merged(
    base: list[LazyTensor], adapter: Adapter, nf4_from: torch.dtype | None, with_lora: bool, dtype: torch.dtype
) -> Iterator[LazyTensor]:
    for tensor in base:
        name = canonical_name(tensor.name)
        layer = adapter.layers.get(name.removesuffix(".weight"))
        if name in adapter.saved:
            _check_shape(name, tensor.shape, adapter.saved[name].shape, adapter)
            tensor = replace(tensor, load=adapter.saved[name].load)
        elif (stored := adapter.stored_rows(name)) in adapter.rows:
            tensor = _with_rows(tensor, adapter.rows[stored], adapter.token_ids[stored], dtype)
        elif nf4_from is not None and is_quantized(name, tensor.shape):
            tensor = _quantized(tensor, nf4_from)
        if layer is not None and (with_lora or is_tower(name)):
            _check_shape(name, tensor.shape, (layer.up.shape[0], layer.down.shape[1]), adapter)
            tensor = _with_layer(tensor, layer, dtype)
        yield tensor


def is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """Check whether `load_base` quantises a weight to 4 bits, as it does the language model's matrices."""
    return name.startswith("model.language_model.layers.") and len(shape) == 2


def _quantized(tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    return replace(tensor, load=lambda: nf4_round_trip(tensor.load(), dtype))


def _with_layer(tensor: LazyTensor, layer: LoraLayer, dtype: torch.dtype) -> LazyTensor:
    def load() -> torch.Tensor:
        magnitude = layer.magnitude.load().float() if layer.magnitude else None
        down, up = layer.down.load().float(), layer.up.load().float()
        return merge_weight(tensor.load(), down, up, layer.scaling, magnitude, dtype)

    return replace(tensor, load=load)


def _with_rows(tensor: LazyTensor, rows: LazyTensor, ids: list[int], dtype: torch.dtype) -> LazyTensor:
    """Replace the rows of tokens in an embedding or output matrix."""

    def load() -> torch.Tensor:
        matrix = tensor.load().to(dtype, copy=True)
        matrix[ids] = rows.load().to(dtype)
        return matrix

    return replace(tensor, load=load)


def _check_shape(name: str, base: tuple[int, ...], adapter: tuple[int, ...], source: Adapter) -> None:
    if base != adapter:
        raise UserError(
            f"{source.folder}: {name} is {_times(adapter)} in the adapter and {_times(base)} in its base; it "
            "belongs to another base"
        )


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
