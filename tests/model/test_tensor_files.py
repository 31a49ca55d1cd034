"""Weight files are written and read one tensor at a time, in the format of the safetensors library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_llava.core.errors import UserError
from lora_llava.model.weights import tensor_files
from lora_llava.model.weights.tensor_files import LazyTensor, iterate_tensors, lazy_tensors, write_checkpoint


def drawn(*shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"tensor.{i}": torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}


def lazy(tensors: dict[str, torch.Tensor]) -> list[LazyTensor]:
    return [LazyTensor(name, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()]  # type: ignore[misc]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_library_reads_what_is_written(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = drawn((3, 5), (), (7,), (2, 0, 3), (4, 4)) | {"transposed": torch.arange(6.0).reshape(2, 3).T}
    (file,) = write_checkpoint(lazy(tensors), tmp_path, dtype)
    assert file.name == "model.safetensors"
    read = load_file(file)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name].to(dtype)) for name in tensors)
    with safe_open(file, "pt") as content:
        assert content.metadata() == {"format": "pt"}


def test_shards_are_named_and_indexed_as_transformers_does(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(tensor_files, "SHARD_BYTES", 100)
    tensors = drawn((10,), (10,), (10,), (50,), (3,))  # 40 + 40, 40, 200 alone, 12
    files = write_checkpoint(lazy(tensors), tmp_path, torch.float32)
    assert [file.name for file in files] == [f"model-{i:05d}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 332}
    assert list(index["weight_map"].values()) == [files[i].name for i in (0, 0, 1, 2, 3)]
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in iterate_tensors(tmp_path))


@pytest.mark.parametrize("left", [4, 60, -8])
def test_a_truncated_file_is_reported_in_one_line(left: int, tmp_path: Path) -> None:
    save_file(drawn((8, 8)), tmp_path / "model.safetensors")
    original = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(original[:left])
    with pytest.raises(UserError, match=r"model\.safetensors is truncated or damaged .*; download it or write it"):
        lazy_tensors(tmp_path)


def test_a_tensor_of_an_unexpected_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"tensor\.0 has shape \(2,\), not \(3,\)"):
        write_checkpoint([LazyTensor("tensor.0", (3,), lambda: torch.zeros(2))], tmp_path, torch.float32)
