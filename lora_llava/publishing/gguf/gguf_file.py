"""Write a GGUF file one tensor at a time, and read it back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_llava.core.errors import UserError
from lora_llava.model.weights.tensor_files import LazyTensor
from lora_llava.publishing.gguf.gguf_types import encode_tensor, stored_bytes

Typed = tuple[LazyTensor, Any]
"""A tensor, and the `gguf.GGMLQuantizationType` in which it is written."""


def check_gguf() -> None:
    """Check that the `gguf` library is installed.

    Raises:
        UserError: If it is not.
    """
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError("--format gguf needs the gguf library: pip install 'lora_llava[gguf]'") from None


def file_bytes(tensors: Sequence[Typed]) -> int:
    """Return the bytes of a file's tensors."""
    return sum(stored_bytes(tensor.shape, kind) for tensor, kind in tensors)


def write_gguf(
    file: Path, arch: str, tensors: Sequence[Typed], metadata: Callable[[Any], None], progress: Callable[[int], Any]
) -> None:
    """Write a file with one tensor in memory at a time, and check it by reading it back.

    Args:
        file: The new file.
        arch: llama.cpp's architecture.
        tensors: The tensors in the order of the file.
        metadata: Adds the metadata to a `gguf.GGUFWriter`.
        progress: Called with the bytes of each tensor that is written.

    Raises:
        UserError: If a value does not fit its type.
        RuntimeError: If the file reads back otherwise.
    """
    import gguf

    writer = gguf.GGUFWriter(file, arch)
    try:
        metadata(writer)
        for tensor, kind in tensors:
            size = stored_bytes(tensor.shape, kind)
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, kind in tensors:
            value = tensor.load()
            if tuple(value.shape) != tuple(tensor.shape):
                raise RuntimeError(f"{tensor.name} has shape {tuple(value.shape)}, not {tensor.shape}")
            writer.write_tensor_data(encode_tensor(tensor.name, value, kind))
            progress(stored_bytes(tensor.shape, kind))
    finally:
        writer.close()
    verify_gguf(file, tensors)


def verify_gguf(file: Path, tensors: Sequence[Typed]) -> None:
    """Check a file's tensors with the `gguf` library's reader.

    Args:
        file: The file.
        tensors: What it should contain.

    Raises:
        RuntimeError: If a tensor is missing, or has another shape or type.
    """
    import gguf

    found = {t.name: (tuple(reversed(t.shape.tolist())), t.tensor_type) for t in gguf.GGUFReader(file).tensors}
    wanted = {tensor.name: (tuple(tensor.shape), kind) for tensor, kind in tensors}
    if found != wanted:
        wrong = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise RuntimeError(f"{file} reads back otherwise than it was written: {', '.join(wrong[:5])}")
