"""Read and write weight files one tensor at a time, without a complete shard in memory."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lora_llava.core.errors import UserError
from lora_llava.core.progress import progress_bar

SHARD_BYTES = 2 * 2**30
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Names of the dtypes in the safetensors format (safetensors/src/tensor.rs, Dtype)."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor on disk that is not loaded.

    Attributes:
        name: Its name.
        shape: Its shape.
        load: Reads it.
    """

    name: str
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]


def weight_files(files: Sequence[str]) -> list[str]:
    """Return a checkpoint's weight files by transformers' names: safetensors, or else `.bin`, as in Vicuna."""
    for name in (r"model", r"pytorch_model"):
        ending = "safetensors" if name == "model" else "bin"
        found = [file for file in sorted(files) if re.fullmatch(rf"{name}(-\d+-of-\d+)?\.{ending}", file)]
        if found:
            return found
    return []


def lazy_tensors(folder: Path) -> list[LazyTensor]:
    """List a checkpoint's tensors without loading them.

    Args:
        folder: Folder of safetensors, or else of `.bin` files, which are read with `weights_only=True`.

    Raises:
        UserError: If there are no weight files, or one is damaged or has other objects than tensors.
    """
    names = weight_files(os.listdir(folder))
    if not names:
        raise UserError(f"{folder} has no *.safetensors and no pytorch_model*.bin")
    return [tensor for name in names for tensor in lazy_file(folder / name)]


def lazy_file(file: Path) -> list[LazyTensor]:
    """List a weight file's tensors without loading them.

    Raises:
        UserError: If it is missing, damaged, or has other objects than tensors.
    """
    if file.suffix != ".safetensors":
        return [LazyTensor(n, tuple(t.shape), lambda t=t: t) for n, t in load_bin(file).items()]  # type: ignore[misc]

    def load(name: str) -> torch.Tensor:  # opened for each tensor, so that the pages of the file can be freed
        with safe_open(file, framework="pt") as content:
            return content.get_tensor(name)

    try:
        with safe_open(file, framework="pt") as content:
            shapes = {name: tuple(content.get_slice(name).get_shape()) for name in content.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{file} is missing") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is truncated or damaged ({error}); download it or write it again") from None
    return [LazyTensor(name, shape, lambda name=name: load(name)) for name, shape in shapes.items()]  # type: ignore[misc]


def iterate_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a checkpoint's tensors one at a time.

    Raises:
        UserError: See `lazy_tensors`.
    """
    for tensor in lazy_tensors(folder):
        yield tensor.name, tensor.load()


def load_bin(file: Path) -> dict[str, torch.Tensor]:
    """Read a `.bin` of plain tensors; nothing in it is executed.

    Raises:
        UserError: If it is missing or has other objects than tensors.
    """
    if not file.is_file():
        raise UserError(f"{file} is missing")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises several kinds for a damaged or foreign file
        raise UserError(f"{file} is not a file of tensors: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"{file} should contain a dict of tensors")
    return content


def write_checkpoint(
    tensors: Sequence[LazyTensor], folder: Path, dtype: torch.dtype, description: str | None = None
) -> list[Path]:
    """Write a checkpoint as `model.safetensors`, or as shards and their index, with transformers' names.

    One tensor is in memory at a time: the shapes are known, so each file's header is written before its tensors (the
    format: https://huggingface.co/docs/safetensors).

    Args:
        tensors: The tensors in the order of the file.
        folder: The folder to write to.
        dtype: Storage dtype: float32, bfloat16 or float16.
        description: Text before the progress bar; None for no bar.

    Returns:
        The weight files.

    Raises:
        RuntimeError: If a tensor has another shape than its entry.
    """
    shards = plan_shards(tensors, dtype)
    files = [folder / _shard_name(i, len(shards)) for i in range(len(shards))]
    total = checkpoint_bytes(tensors, dtype)
    with progress_bar(total=total, desc=description, unit="B", unit_scale=True, disable=description is None) as bar:
        for shard, file in zip(shards, files, strict=True):
            write_file(shard, file, dtype, lambda tensor: bar.update(_bytes(tensor, dtype)) and None)
    if len(shards) > 1:
        weight_map = {tensor.name: file.name for shard, file in zip(shards, files, strict=True) for tensor in shard}
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")
    return files


def plan_shards(tensors: Sequence[LazyTensor], dtype: torch.dtype) -> list[list[LazyTensor]]:
    """Divide a checkpoint into shards of at most `SHARD_BYTES`, or of one larger tensor."""
    shards: list[list[LazyTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + _bytes(tensor, dtype) > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += _bytes(tensor, dtype)
    return shards


def checkpoint_bytes(tensors: Sequence[LazyTensor], dtype: torch.dtype) -> int:
    """Return the bytes of a checkpoint's tensors on disk."""
    return sum(_bytes(tensor, dtype) for tensor in tensors)


def _bytes(tensor: LazyTensor, dtype: torch.dtype) -> int:
    return torch.Size(tensor.shape).numel() * dtype.itemsize


def _shard_name(index: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def write_file(
    tensors: Sequence[LazyTensor],
    file: Path,
    dtype: torch.dtype,
    progress: Callable[[LazyTensor], None] = lambda tensor: None,
) -> None:
    """Write one safetensors file.

    Args:
        tensors: The tensors in the order of the file.
        file: The file to write.
        dtype: Storage dtype.
        progress: Called with every tensor that is written.

    Raises:
        RuntimeError: If a tensor has another shape than its entry.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + _bytes(tensor, dtype)
        header[tensor.name] = {"dtype": _DTYPES[dtype], "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts at a multiple of 8
    with ThreadPoolExecutor(1) as flusher, file.open("wb") as stream:
        flushed: Future[Any] = flusher.submit(int)
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor, value in zip(tensors, _one_ahead(tensors, dtype), strict=True):
            if tuple(value.shape) != tensor.shape:
                raise RuntimeError(f"{tensor.name} has shape {tuple(value.shape)}, not {tensor.shape}")
            stream.write(value.reshape(-1).view(torch.uint8).numpy().data)
            progress(tensor)
            if flushed.done():  # otherwise the system caches a complete shard before writing
                flushed = flusher.submit(os.fsync, stream.fileno())
        flushed.result()
        stream.flush()
        os.fsync(stream.fileno())


def _one_ahead(tensors: Sequence[LazyTensor], dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Yield the tensors, reading the next one while the last is written."""

    def read(tensor: LazyTensor) -> torch.Tensor:
        return tensor.load().to(dtype).contiguous()

    with ThreadPoolExecutor(1) as pool:
        coming = [pool.submit(read, tensor) for tensor in tensors[:1]]
        for following in [*tensors[1:], None][: len(tensors)]:
            value = coming.pop().result()
            if following is not None:
                coming.append(pool.submit(read, following))
            yield value
