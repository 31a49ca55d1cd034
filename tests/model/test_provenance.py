"""An adapter records the hashes of its base, and another base is refused with both named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_llava.core.errors import UserError
from lora_llava.model.provenance import check_base, component_hashes, locate_base
from lora_llava.model.start import prepare_base
from lora_llava.model.weights import tensor_files
from lora_llava.model.weights.names import canonical_name, component_of
from lora_llava.model.weights.tensor_files import lazy_tensors, write_checkpoint
from lora_llava.recipe import Recipe


@pytest.fixture
def base(stage2: Recipe) -> Any:
    return prepare_base(stage2.model, 0)


def copied(base: Path, folder: Path, change: str = "") -> Path:
    """Copy a base, with one value changed in the tensors whose name contains `change`."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if change and change in name:
            tensor.view(-1)[0] += 1
            break
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_both_layouts_have_the_same_canonical_names() -> None:
    pairs = {
        "language_model.model.layers.0.mlp.up_proj.weight": "model.language_model.layers.0.mlp.up_proj.weight",
        "language_model.lm_head.weight": "lm_head.weight",
        "vision_tower.vision_model.pre_layrnorm.bias": "model.vision_tower.pre_layrnorm.bias",
        "model.vision_tower.vision_model.pre_layrnorm.bias": "model.vision_tower.pre_layrnorm.bias",
        "multi_modal_projector.linear_1.bias": "model.multi_modal_projector.linear_1.bias",
    }
    for old, new in pairs.items():
        assert canonical_name(old) == new
        assert canonical_name(new) == new
    assert [component_of(name) for name in pairs.values()] == [
        "llm",
        "llm",
        "vision_tower",
        "vision_tower",
        "projector",
    ]


@pytest.mark.parametrize(
    ("change", "part"), [("layers.1.mlp", "llm"), ("vision_tower", "vision_tower"), ("projector", "projector")]
)
def test_a_changed_value_changes_one_hash(base: Any, tmp_path: Path, change: str, part: str) -> None:
    hashes = component_hashes(base.folder)
    other = component_hashes(copied(base.folder, tmp_path / "other", change))
    assert [name for name in hashes if hashes[name] != other[name]] == [part]


def test_shards_and_layout_of_names_do_not_matter(base: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(tensor_files, "SHARD_BYTES", 20_000)
    from dataclasses import replace

    tensors = [replace(t, name=canonical_name(t.name)) for t in reversed(lazy_tensors(base.folder))]
    assert len(write_checkpoint(tensors, tmp_path, torch.bfloat16)) > 3
    assert component_hashes(tmp_path) == component_hashes(base.folder)


def test_hashes_are_cached_until_a_file_changes(base: Any, tmp_path: Path) -> None:
    folder = copied(base.folder, tmp_path / "copy")
    hashes = component_hashes(folder)
    original = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    assert component_hashes(folder) != hashes


def test_another_base_is_refused_with_both_named(base: Any, tmp_path: Path) -> None:
    recorded = base.as_dict()
    check_base(recorded, base.folder, Path("run"))
    folder = copied(base.folder, tmp_path / "other", "layers.0")
    theirs = component_hashes(folder)["llm"][:12]
    llm, ours = recorded["parts"]["llm"], recorded["hashes"]["llm"][:12]
    with pytest.raises(UserError) as error:
        check_base(recorded, folder, Path("run"))
    assert str(error.value) == (
        f"run was trained on another llm ({llm}, {ours}) than {folder} holds ({theirs}); restore the base it was "
        "trained on"
    )


def test_a_missing_assembled_base_is_assembled_again(base: Any, monkeypatch: Any, tmp_path: Path) -> None:
    recorded = json.loads(json.dumps(base.as_dict()))
    recorded["name"] = str(tmp_path / "gone")
    monkeypatch.setenv("LORA_LLAVA_CACHE", str(tmp_path / "cache"))
    folder = locate_base(recorded, Path("run"))
    assert folder.is_relative_to(tmp_path / "cache")
    assert component_hashes(folder) == recorded["hashes"]
    recorded["parts"]["llm_revision"] = "0" * 64
    with pytest.raises(UserError, match=r"which is missing, and .* has changed"):
        locate_base(recorded, Path("run"))
    recorded["parts"] = None
    with pytest.raises(UserError, match="which is missing; restore it, or train again"):
        locate_base(recorded, Path("run"))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_flipped_bit_in_a_cached_base_is_detected_and_the_base_rebuilt(
    stage2: Recipe, monkeypatch: Any, tmp_path: Path, name: str, capsys: Any
) -> None:
    monkeypatch.setenv("LORA_LLAVA_CACHE", str(tmp_path / "cache"))
    base = prepare_base(stage2.model, 0)
    recorded, file = base.as_dict(), base.folder / name
    original, state = file.read_bytes(), file.stat()
    for again in (lambda: prepare_base(stage2.model, 0).folder, lambda: locate_base(recorded, tmp_path / "run")):
        file.write_bytes(original[:-5] + bytes([original[-5] ^ 1]) + original[-4:])
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert again() == base.folder
        assert file.read_bytes() == original
        assert f"({name} has changed); writing it again" in capsys.readouterr().err


def test_a_failed_or_killed_write_leaves_no_partial_base(stage2: Recipe, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("LORA_LLAVA_CACHE", str(tmp_path / "cache"))
    left = tmp_path / "cache" / "bases" / "0123456789abcdef0123.partial"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    folder = prepare_base(stage2.model, 0).folder
    assert list((tmp_path / "cache" / "bases").iterdir()) == [folder]
