"""A trainer's state as safetensors and JSON: nothing of it is ever executed on the way back."""

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
    """Write dictionaries, lists, tuples, numbers, texts and tensors, nested in any way.

    Args:
        folder: Where `state.json` and `state.safetensors` are put.
        state: Tensors of any dtype and device; keys are texts or whole numbers.

    Raises:
        TypeError: For anything else.
    """
    tensors: dict[str, torch.Tensor] = {}
    content = _flatten(state, tensors)
    (folder / STATE_JSON).write_text(json.dumps(content), encoding="utf-8")
    save_file(tensors, folder / STATE_TENSORS)


def load_state(folder: Path) -> Any:
    """Read what `save_state` wrote, tensors on the CPU.

    Raises:
        UserError: Where it is not what was written.
    """
    try:
        content = json.loads((folder / STATE_JSON).read_text(encoding="utf-8"))
        return _restore(content, load_file(folder / STATE_TENSORS))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise UserError(f"{folder}: the trainer's state cannot be read ({error}); resume from another one") from None


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
    raise TypeError(f"a trainer's state holds a {type(value).__name__}, which has no place in a file")


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
    """Where every generator of random numbers stands: Python's, NumPy's, torch's, and CUDA's of this device."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put every generator where `random_state` found it.

    Raises:
        UserError: For what is no such state.
    """
    try:
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the checkpoint's random numbers cannot be read ({error}); resume from another one") from None
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
