"""A trainer's state as safetensors and JSON, which execute nothing when loaded."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lora_llava.core.errors import UserError

STATE_JSON, STATE_TENSORS = "state.json", "state.safetensors"


def save_state(folder: Path, state: Any) -> None:
    """Write nested dictionaries, lists, tuples, numbers, strings and tensors.

    Args:
        folder: The folder for `state.json` and `state.safetensors`.
        state: Tensors of any dtype and device; keys are strings or integers.

    Raises:
        TypeError: For a value of any other type.
    """
    tensors: dict[str, torch.Tensor] = {}
    content = _flatten(state, tensors)
    (folder / STATE_JSON).write_text(json.dumps(content), encoding="utf-8")
    save_file(tensors, folder / STATE_TENSORS)


def load_state(folder: Path) -> Any:
    """Read a state written by `save_state`, with tensors on the CPU.

    Raises:
        UserError: If the files are damaged.
    """
    try:
        content = json.loads((folder / STATE_JSON).read_text(encoding="utf-8"))
        return _restore(content, load_file(folder / STATE_TENSORS))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise UserError(
            f"{folder}: the trainer's state cannot be read ({error}); resume from another checkpoint"
        ) from None


def _flatten(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, np.ndarray):
        return {"array": _flatten(torch.from_numpy(value.astype(np.int64)), tensors), "dtype": str(value.dtype)}
    if isinstance(value, dict):
        return {"dict": [[key, _flatten(each, tensors)] for key, each in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_flatten(each, tensors) for each in value]}
    if isinstance(value, list):
        return [_flatten(each, tensors) for each in value]
    if isinstance(value, np.integer | np.floating):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a trainer's state contains a {type(value).__name__}, which cannot be saved")


def _restore(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_restore(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "array" in value:
        return _restore(value["array"], tensors).numpy().astype(value["dtype"])
    if "tuple" in value:
        return tuple(_restore(each, tensors) for each in value["tuple"])
    return {key: _restore(each, tensors) for key, each in value["dict"]}


def random_state() -> dict[str, Any]:
    """Return the state of the random generators of Python, NumPy, torch, and CUDA on this device."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the random generators to a state from `random_state`.

    Raises:
        UserError: If it is not such a state.
    """
    try:
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"the checkpoint's random numbers cannot be read ({error}); resume from another checkpoint"
        ) from None
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
