"""FSDP2 through accelerate: weights are sharded over ranks, and gathered to be written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, DistributedType, PartialState
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from lora_llava.core.errors import UserError
from lora_llava.model.adapters import NEWLINE, adapter_tensors
from lora_llava.model.loading import resolve_dtype
from lora_llava.recipe import Recipe

_SETTINGS = {
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    # Otherwise transformers leaves the weights empty on all ranks but the first (modeling_utils.py).
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
"""The environment variables of accelerate's FSDP (accelerate/utils/dataclasses.py) that this trainer needs."""
_LAYER_CLASSES = "FSDP_TRANSFORMER_CLS_TO_WRAP"
_RECOMPUTE = "FSDP_ACTIVATION_CHECKPOINTING"


def is_sharded() -> bool:
    """Check whether FSDP was requested, by `accelerate launch --use_fsdp` or its environment variable."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def check_sharding(recipe: Recipe, ranks: int) -> None:
    """Refuse settings with which FSDP2 is not known to match one process, and set accelerate's other settings.

    Args:
        recipe: The recipe.
        ranks: The number of processes.

    Raises:
        UserError: For a setting that is not supported.
    """
    settings = {name: os.environ.get(name, "false").lower() for name in ("FSDP_OFFLOAD_PARAMS", _RECOMPUTE)}
    if os.environ.setdefault("FSDP_VERSION", "2") != "2":
        raise UserError("FSDP's first version is not supported; add --fsdp_version 2")
    if ranks == 1:
        raise UserError(
            "FSDP shards a model over several processes, and only one was started; start several, or leave FSDP out"
        )
    if recipe.evaluation is not None:
        raise UserError(
            "evaluation: answers need the complete model on one GPU, and FSDP shards it; set evaluation=null, and run "
            f"lora-llava evaluate {recipe.output_dir} afterwards"
        )
    if recipe.training.optimizer == "paged_adamw_8bit":
        raise UserError("training.optimizer: paged_adamw_8bit cannot update sharded weights; set adamw_torch, or auto")
    if settings["FSDP_OFFLOAD_PARAMS"] == "true":
        raise UserError(
            "FSDP's parameter offload has not been tested with this trainer; leave --fsdp_offload_params out"
        )
    if settings[_RECOMPUTE] == "true":
        raise UserError(f"leave --{_RECOMPUTE.lower()} out; training.gradient_checkpointing does it")
    for key, chosen in _untested(recipe).items():
        if chosen:
            raise UserError(f"{key} has not been tested with weights that FSDP shards; drop it, or start without FSDP")
    os.environ.update(_SETTINGS)


def require_input_gradients(model: Any) -> None:
    """Let the first layer's input have a gradient in every batch, as it has in one with images.

    Otherwise a rank whose row has no image reduces the gradients in another order than the others, or in Stage 1 does
    not gather the layers for the backward pass, and the others wait for it.

    Args:
        model: The stock LLaVA; changed in place.
    """

    def require(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.requires_grad_(True) if torch.is_grad_enabled() else output

    model.get_input_embeddings().register_forward_hook(require)


def shard_by_layer(classes: str) -> None:
    """Let accelerate gather the weights of one decoder layer at a time.

    Args:
        classes: Names of the layers' classes, joined by commas, as `LlamaDecoderLayer`.
    """
    os.environ[_LAYER_CLASSES] = classes


def _untested(recipe: Recipe) -> dict[str, bool]:
    """Return choices of what trains that only complete models are known to train, and whether a recipe has them."""
    lora = recipe.lora
    return {
        "lora.vision": lora is not None and lora.vision is not None,
        "lora.modules_to_save": lora is not None and bool(lora.modules_to_save),
        "lora.init": lora is not None and lora.init != "default",
        "model.new_tokens": bool(recipe.model.new_tokens),
        "model.dtype float16": resolve_dtype(recipe.model.dtype) == torch.float16,
    }


def configure_sharding(accelerator: Any) -> None:
    """Configure accelerate to shard the model, with gradients summed in float32.

    Args:
        accelerator: The trainer's.
    """
    # On CPUs accelerate silently ignores FSDP (accelerate/state.py), so its state is set here.
    if not torch.cuda.is_available():
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state |= {
            "distributed_type": DistributedType.FSDP,
            "fsdp_plugin": FullyShardedDataParallelPlugin(),
        }
    # None keeps the dtype of the weights.
    computed = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=computed, reduce_dtype=torch.float32)
    accelerator.state.fsdp_plugin.mixed_precision_policy = policy


def describe_shard(model: PeftModel) -> str:
    """Describe in one line how many bytes of a sharded model this rank holds."""
    parameters = list(model.parameters())
    held = sum(_bytes(p.to_local() if isinstance(p, DTensor) else p) for p in parameters)
    return f"FSDP2: this process has {held / 1e6:,.2f} of {sum(map(_bytes, parameters)) / 1e6:,.2f} MB of weights"


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def gather_full(value: Any) -> Any:
    """Return sharded tensors as full ones on the CPU, and everything else unchanged; every rank must call it.

    Args:
        value: Nested dictionaries, lists and tuples of tensors and other values.
    """
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, dict):
        return {key: gather_full(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(gather_full(each) for each in value)
    return value


def full_weights(model: PeftModel) -> dict[str, torch.Tensor] | None:
    """Return the full tensors that peft saves of a sharded model; None for any other, which peft can read itself.

    Args:
        model: The model; every rank must call it.
    """
    kept = _kept_parameters(model)
    return gather_full(kept) if any(isinstance(p, DTensor) for p in kept.values()) else None


def load_weights(model: PeftModel, folder: Path) -> None:
    """Load saved weights into a sharded model.

    Args:
        model: The model; every rank must call it.
        folder: A checkpoint.

    Raises:
        UserError: If the names of the weights are not those of the model.
    """
    # Compare by the names that peft saves, which lack the adapter's name.
    saved = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    places: dict[str, Any] = adapter_tensors(model, _kept_parameters(model))
    if saved.keys() != places.keys():
        name = min(saved.keys() ^ places.keys())
        raise UserError(
            f"{folder}: {name} is not in both the checkpoint and the model; resume with the recipe of the run"
        )
    # Every rank reads all weights and copies its shard.
    with torch.no_grad():
        for name, place in places.items():
            place.to_local().copy_(_shard(saved[name], place).to_local())


def shard_states(optimizer: torch.optim.Optimizer) -> None:
    """Shard an optimizer's states like its parameters, after full ones were loaded."""
    for parameter, states in optimizer.state.items():
        if isinstance(parameter, DTensor):
            for name, value in states.items():
                if value.shape == parameter.shape:  # the step counter is a scalar on every rank
                    states[name] = _shard(value, parameter)


def _shard(value: torch.Tensor, like: DTensor) -> DTensor:
    value = value.to(like.device, like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements)


def _kept_parameters(model: PeftModel) -> dict[str, Any]:
    """Return the parameters of LoRA, projector and newline by name, sharded."""
    # After a forward pass without a backward one, some are still gathered, in a lower dtype.
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    kept = ("lora_", ".modules_to_save.", f".{NEWLINE}")
    return {name: p for name, p in model.named_parameters() if any(part in name for part in kept)}
