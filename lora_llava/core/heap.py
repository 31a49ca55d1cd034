"""The heap of the C library, kept small: on a CPU it holds the tensors of training."""

from __future__ import annotations

import ctypes
import os
import sys

_MMAP_THRESHOLD = -3
"""`M_MMAP_THRESHOLD` of malloc.h (glibc)."""
OWN_MAPPING_BYTES = 8 * 2**20
"""Blocks from this size on are mapped by themselves, and returned to the system when they are freed."""


def return_large_blocks() -> bool:
    """Let the C library return large blocks to the system as soon as they are freed.

    glibc raises the size from which it does so up to 32 MiB as such blocks are freed. Smaller ones then come from the
    heap, where each gradient of an adapter lies between freed activations and keeps their places from being joined:
    0.15 GiB per layer of a 7B model that is recomputed on a row of 512 tokens, and 0.3 to 0.4 GiB at 1,535.

    Returns:
        Whether it was set: only on Linux with glibc, and where the environment does not set it.
    """
    if not sys.platform.startswith("linux") or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "gnu_get_libc_version"):  # musl
        return False
    return bool(libc.mallopt(_MMAP_THRESHOLD, OWN_MAPPING_BYTES))
