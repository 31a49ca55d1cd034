"""The memory that a run may take: what is free, what the recipe asks for, and the limit that torch keeps to."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from lora_llava.core.errors import UserError
from lora_llava.distributed.ranks import this_rank
from lora_llava.planning.memory import CUDA_CONTEXT, GIB, PROCESS
from lora_llava.recipe import Recipe


def memory_budget(recipe: Recipe) -> tuple[int, str]:
    """Return the bytes available for a run on this machine, and a description of their source.

    Raises:
        UserError: If the GPU has no memory left at all.
    """
    free, source = _free_memory()
    requested = recipe.training.memory_gb
    if requested == "auto":
        return free, source
    return int(requested * GIB), f"training.memory_gb {requested:g} GiB"


def check_budget(recipe: Recipe) -> None:
    """Refuse a `training.memory_gb` that is more than what is free.

    Raises:
        UserError: Naming both.
    """
    requested = recipe.training.memory_gb
    if requested == "auto":
        return
    free, source = _free_memory()
    if requested * GIB > free:
        most = int(10 * free / GIB) / 10
        raise UserError(
            f"training.memory_gb is {requested:g}, and {free / GIB:.1f} GiB are {source}; set training.memory_gb="
            f"{most:g} or auto, or stop what uses the rest{other_gpu(int(requested * GIB))}"
        )


def limit_memory(recipe: Recipe) -> None:
    """Let torch take no more of the GPU than the budget: Windows and WSL would continue in host memory, slowly.

    Args:
        recipe: The recipe; without `training.memory_gb` the limit is what is free now.
    """
    if not torch.cuda.is_available():
        return
    budget, _ = memory_budget(recipe)
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    # CUDA's context is in the budget, and torch does not count it.
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, budget - CUDA_CONTEXT) / total))


def available_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes that this process can still take: of the machine, or of its container if that has fewer.

    Args:
        cgroup: Folder of the container's limits, of version 2 or 1 (kernel.org, admin-guide/cgroup-v2.rst).
    """
    found = int(psutil.virtual_memory().available)
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            free = int((cgroup / limit).read_text()) - int((cgroup / used).read_text())
            counts = dict(line.split() for line in (cgroup / limit).with_name("memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such version, or no limit
            continue
        # Pages of files are in use until another program needs the memory.
        found = min(found, free + int(counts.get("inactive_file", 0)) + int(counts.get("active_file", 0)))
    return found


def _free_memory() -> tuple[int, str]:
    """Return the free bytes of the device, with those that this process uses already, and a description."""
    if not torch.cuda.is_available():
        return available_bytes() + PROCESS, "free memory"
    try:
        free = torch.cuda.mem_get_info()[0]
    except RuntimeError as error:  # no room for the context
        raise UserError(f"{_name()} cannot be used ({str(error).splitlines()[0]}){other_gpu(0)}") from None
    return free + torch.cuda.memory_reserved() + CUDA_CONTEXT, f"free on {_name()}"


def _name() -> str:
    """Return the GPU of this process, by its number too where there are several."""
    place = torch.cuda.current_device()
    name = torch.cuda.get_device_name(place)
    return f"GPU {place}, {name}" if torch.cuda.device_count() > 1 else f"the GPU, {name}"


def other_gpu(needed: int) -> str:
    """Return the end of a message that names another GPU with enough free memory; an empty text if there is none.

    Args:
        needed: Bytes.
    """
    if not torch.cuda.is_available() or this_rank()[1] > 1:
        return ""
    for place in range(torch.cuda.device_count()):
        if place == torch.cuda.current_device():
            continue
        try:
            free = torch.cuda.mem_get_info(place)[0]
        except RuntimeError:
            continue
        if free >= max(needed, CUDA_CONTEXT):
            return (
                f"; GPU {place}, {torch.cuda.get_device_name(place)}, has {free / GIB:.1f} GiB free: set "
                f"CUDA_VISIBLE_DEVICES={place}"
            )
    return ""


def describe_device() -> str:
    """Describe the device that would train."""
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        return f"{torch.cuda.get_device_name()}, {memory / GIB:.1f} GiB"
    return "no GPU for torch: training would run on the CPU"
