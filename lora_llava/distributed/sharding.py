"""FSDP2 through accelerate: every rank holds a share of the weights; they are whole where they are written or read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, DistributedType, PartialState
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from lora_llava.core.errors import UserError
from lora_llava.recipe import Recipe

_SETTINGS = {
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    # transformers would give ranks but the first empty weights (modeling_utils.py), which our own loading reads.
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
"""What accelerate reads of FSDP (accelerate/utils/dataclasses.py), as this trainer needs it."""
_RECOMPUTE = "FSDP_ACTIVATION_CHECKPOINTING"


def is_sharded() -> bool:
    """Whether `accelerate launch --use_fsdp`, or the environment that it sets, asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def check_sharding(recipe: Recipe, ranks: int) -> None:
    """Refuse what FSDP2 is not known to give as one process does, and settle the rest of accelerate's settings.

    Args:
        recipe: The recipe.
        ranks: Processes that were started.

    Raises:
        UserError: With what to change.
    """
    told = {name: os.environ.get(name, "false").lower() for name in ("FSDP_OFFLOAD_PARAMS", _RECOMPUTE)}
    if os.environ.setdefault("FSDP_VERSION", "2") != "2":
        raise UserError("FSDP's first version is not supported; add --fsdp_version 2")
    if ranks == 1:
        raise UserError("FSDP shares a model out over processes, and there is one; start several, or leave FSDP out")
    if recipe.evaluation is not None:
        raise UserError(
            "evaluation: answers need the whole model on one GPU, and FSDP shares it out; set evaluation=null, and run "
            f"lora-llava evaluate {recipe.output_dir} afterwards"
        )
    if recipe.training.optimizer == "paged_adamw_8bit":
        raise UserError("training.optimizer: paged_adamw_8bit cannot step shares of weights; set adamw_torch, or auto")
    if told["FSDP_OFFLOAD_PARAMS"] == "true":
        raise UserError("FSDP's offload of parameters has not been tried here; leave --fsdp_offload_params out")
    if told[_RECOMPUTE] == "true":
        raise UserError(f"leave --{_RECOMPUTE.lower()} out; training.gradient_checkpointing does it")
    os.environ.update(_SETTINGS)


def configure_sharding(accelerator: Any) -> None:
    """Let accelerate shard what it prepares, also on CPUs, which it leaves out without a word (accelerate/state.py);
    gradients are summed in float32.

    Args:
        accelerator: The trainer's.
    """
    if not torch.cuda.is_available():
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state |= {
            "distributed_type": DistributedType.FSDP,
            "fsdp_plugin": FullyShardedDataParallelPlugin(),
        }
    computed = torch.bfloat16 if torch.cuda.is_available() else None
    policy = MixedPrecisionPolicy(param_dtype=computed, reduce_dtype=torch.float32)
    accelerator.state.fsdp_plugin.mixed_precision_policy = policy


def describe_share(model: PeftModel) -> str:
    """What this rank holds of a model that is shared out, in a line."""
    parameters = list(model.parameters())
    held = sum(_bytes(p.to_local() if isinstance(p, DTensor) else p) for p in parameters)
    return f"FSDP2: this process holds {held / 1e6:,.2f} of {sum(map(_bytes, parameters)) / 1e6:,.2f} MB of weights"


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def gather_full(value: Any) -> Any:
    """Tensors that are shared out, whole and on the CPU; all else as it is. Every rank calls it.

    Args:
        value: Dictionaries, lists and tuples of anything.
    """
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, dict):
        return {key: gather_full(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(gather_full(each) for each in value)
    return value


def full_weights(model: PeftModel) -> dict[str, torch.Tensor] | None:
    """What peft saves of a model that is shared out; None of any other, which peft can see for itself.

    Args:
        model: Every rank calls with its own.
    """
    kept = _kept_parameters(model)
    return gather_full(kept) if any(isinstance(p, DTensor) for p in kept.values()) else None


def load_weights(model: PeftModel, folder: Path) -> None:
    """Put saved weights into a model that is shared out.

    Args:
        model: Every rank calls with its own.
        folder: A checkpoint.

    Raises:
        UserError: Where they are of another model.
    """
    saved = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    places = get_peft_model_state_dict(model, state_dict=_kept_parameters(model), save_embedding_layers=False)
    if saved.keys() != places.keys():
        name = min(saved.keys() ^ places.keys())
        raise UserError(f"{folder}: {name} is not in the checkpoint and the model alike; resume with the run's recipe")
    with torch.no_grad():
        for name, place in places.items():
            place.to_local().copy_(_share(saved[name], place).to_local())


def shard_states(optimizer: torch.optim.Optimizer) -> None:
    """Share out an optimiser's states as its parameters are, after whole ones were loaded into it."""
    for parameter, states in optimizer.state.items():
        if isinstance(parameter, DTensor):
            for name, value in states.items():
                if value.shape == parameter.shape:
                    states[name] = _share(value, parameter)


def _share(value: torch.Tensor, like: DTensor) -> DTensor:
    value = value.to(like.device, like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements)


def _kept_parameters(model: PeftModel) -> dict[str, Any]:
    """LoRA and projector by name. After a forward pass without a backward one some are gathered, in a lower dtype."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return {name: p for name, p in model.named_parameters() if "lora_" in name or ".modules_to_save." in name}
