"""What this machine's GPU can compute, why it is not used, and the errors of full memory."""

from __future__ import annotations

import ctypes.util
import functools
import gc
import os
import re
import shutil
import sys
from pathlib import Path

import torch

_AMPERE = 8
"""Major compute capability from which GPUs have bfloat16 and run FlashAttention 2 (its README: Ampere, Ada, Hopper)."""
_FULL = (
    "out of memory",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # of cublasCreate, if its workspace does not fit
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "cudaErrorMemoryAllocation",
)
"""What messages of torch, its libraries and bitsandbytes say if memory is full; only torch's own allocator raises
`OutOfMemoryError`."""
_DRIVER_FILES = ("/proc/driver/nvidia/version", "/usr/lib/wsl/lib/libcuda.so.1")


def is_out_of_memory(error: BaseException) -> bool:
    """Check whether an error is one of full memory, whichever library it comes from.

    Args:
        error: Any error.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _FULL)


def free_memory() -> None:
    """Free what nothing refers to any more, on the GPU too; 4-bit layers and hooks have reference cycles."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without CUDA


def first_sentence(error: BaseException) -> str:
    """Return the first sentence of an error's message, or the error's name if it has none."""
    return " ".join(str(error).split()).split(". ")[0].removesuffix(".") or type(error).__name__


def has_bfloat16() -> bool:
    """Check whether the GPU computes in bfloat16 itself; for one before Ampere, such as a T4, torch emulates it."""
    return torch.cuda.get_device_capability()[0] >= _AMPERE


def capability_problem() -> str | None:
    """Return why a GPU before Ampere lacks bfloat16 and FlashAttention; None for a newer one."""
    major, minor = torch.cuda.get_device_capability()
    return None if major >= _AMPERE else f"this GPU has compute capability {major}.{minor}, below {_AMPERE}.0"


def unused_gpu() -> str | None:
    """Return why an NVIDIA GPU of this machine is not used, with the fix, in one line; None if there is nothing to fix.

    A GPU that was hidden by `CUDA_VISIBLE_DEVICES` is not meant to be used.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    if hidden or torch.cuda.is_available() or not _has_driver():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        version = torch.__version__.partition("+")[0]
        return (
            f"this machine has an NVIDIA GPU, but torch {torch.__version__} is the CPU build, so the CPU computes; "
            f"pip install torch=={version}+cu130 --index-url https://download.pytorch.org/whl/cu130 (cu126 in both "
            "places if `nvidia-smi` shows a driver before 580)"
        )
    reason = _cuda_error()
    found = re.search(r"too old \(found version (\d+)", reason)  # CUDA 12.4 is 12040
    if found is not None:
        major, minor = int(found[1]) // 1000, int(found[1]) % 1000 // 10
        fix = (
            f"the driver runs CUDA up to {major}.{minor}, and this torch is for CUDA {torch.version.cuda}: update the "
            f"driver (nvidia.com/drivers), or install a torch for CUDA {major}.{minor} or older (pytorch.org)"
        )
    else:
        fix = "see whether `nvidia-smi` lists the GPU, update the driver, and restart"
    return (
        f"this machine has an NVIDIA GPU, but torch {torch.__version__} cannot use it ({reason}), so the CPU computes; "
        f"{fix}"
    )


def _cuda_error() -> str:
    """Return the first sentence of torch's own message on why CUDA does not start."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return first_sentence(error)
    return "it finds no GPU"


def _has_driver() -> bool:
    if any(Path(file).exists() for file in _DRIVER_FILES) or shutil.which("nvidia-smi"):
        return True
    return sys.platform == "win32" and ctypes.util.find_library("nvcuda") is not None


@functools.cache
def report_unused_gpu() -> None:
    """Print, once in a process, why the GPU is not used."""
    line = unused_gpu()
    if line is not None and os.environ.get("RANK", "0") == "0":  # set by torchrun: only the first rank prints
        print(line, file=sys.stderr)
