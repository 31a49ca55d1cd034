"""Hostile weight files and checkpoints: nothing in a pickle is run, no header is believed, each is one line."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_llava.runs.checkpoint import MANIFEST_FILE, find_damage, read_manifest
from tests.security.hostile import MEMORY_RISE_MIB, Bait, Outcome, run_verb, safetensors, write_recipe


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def headed(**tensors: dict[str, Any]) -> bytes:
    return json.dumps(tensors).encode()


HEADERS = {
    "2^63 bytes claimed": safetensors(b"{}", 2**63),
    "2^64 - 1 bytes claimed": safetensors(b"{}", 2**64 - 1),
    "header longer than the file": safetensors(b"{}", 10_000),
    "no header": b"",
    "half a length": b"\x10\0\0",
    "no JSON": safetensors(b"\xff" * 64),
    "deep JSON": safetensors(b"[" * 100_000),
    "NaN": safetensors(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', content=bytes(4)),
    "overlapping": safetensors(headed(a=entry(0, 8, [2]), b=entry(4, 12, [2])), content=bytes(12)),
    "a hole": safetensors(headed(a=entry(0, 4, [1]), b=entry(8, 12, [1])), content=bytes(12)),
    "past the end": safetensors(headed(a=entry(0, 2**40, [2**38]))),
    "negative": safetensors(headed(a=entry(-4, 0, [1]))),
    "shape overflows": safetensors(headed(a=entry(0, 4, [2**62, 2**62])), content=bytes(4)),
    "another dtype": safetensors(headed(a=entry(0, 4, [1], "PICKLE")), content=bytes(4)),
}


def start_from(folder: Path, name: str, stage2_content: dict[str, Any], tmp_path: Path, *options: str) -> Outcome:
    """Train on a language model whose one weight file is this."""
    content = stage2_content | {"model": stage2_content["model"] | {"llm": str(folder)}}
    assert (folder / name).is_file()
    return run_verb("finetune", write_recipe(tmp_path / "recipe.yaml", content), *options)


@pytest.fixture
def llm(parts: Path, tmp_path: Path) -> Path:
    """A language model without its weights."""
    folder = tmp_path / "llm"
    shutil.copytree(parts / "llm", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_header_is_one_line(name: str, llm: Path, stage2_content: dict[str, Any], tmp_path: Path) -> None:
    (llm / "model.safetensors").write_bytes(HEADERS[name])
    found = start_from(llm, "model.safetensors", stage2_content, tmp_path)
    assert found.code == 2, found.err
    assert len(found.err.splitlines()) == 1
    assert found.err.startswith(f"error: {llm / 'model.safetensors'} is truncated or damaged (")
    assert found.err.endswith("); download it or write it again\n")
    assert found.rise_mib < MEMORY_RISE_MIB


def test_a_header_of_120_mb_is_refused(llm: Path, stage2_content: dict[str, Any], tmp_path: Path) -> None:
    with (llm / "model.safetensors").open("wb") as stream:
        stream.write((120_000_000).to_bytes(8, "little") + b'{"a":"')
        stream.truncate(120_000_008)
    found = start_from(llm, "model.safetensors", stage2_content, tmp_path)
    assert found.code == 2
    assert found.err.startswith(f"error: {llm / 'model.safetensors'} is truncated or damaged (")
    assert found.rise_mib < MEMORY_RISE_MIB


@pytest.mark.parametrize("form", ["torch", "legacy", "bare"])
def test_a_pickle_in_the_place_of_weights_is_not_run(
    form: str, llm: Path, stage2_content: dict[str, Any], tmp_path: Path
) -> None:
    marker, file = tmp_path / "executed", llm / "pytorch_model.bin"
    write_bait(file, marker, form)
    found = start_from(llm, "pytorch_model.bin", stage2_content, tmp_path)
    assert found.code == 2, found.err
    assert len(found.err.splitlines()) == 1
    assert found.err.startswith(f"error: {file} is not a file of tensors: ")
    assert not marker.exists()


def write_bait(file: Path, marker: Path, form: str = "torch") -> None:
    if form == "bare":
        file.write_bytes(pickle.dumps({"w": Bait(marker)}))
    else:
        torch.save({"w": Bait(marker)}, file, _use_new_zipfile_serialization=form == "torch")


def test_the_bait_would_be_taken(tmp_path: Path) -> None:
    for form in ("torch", "legacy", "bare"):
        file, marker = tmp_path / form, tmp_path / f"{form}.executed"
        write_bait(file, marker, form)
        _ = pickle.loads(file.read_bytes()) if form == "bare" else torch.load(file, weights_only=False)
        assert marker.exists()


@pytest.fixture
def resumable(stage2_content: dict[str, Any], tmp_path: Path) -> tuple[Path, Path]:
    """A recipe, and the newest checkpoint of its run, which was broken off."""
    recipe = write_recipe(tmp_path / "recipe.yaml", stage2_content | {"evaluation": None})
    assert run_verb("finetune", recipe).code == 0
    run = Path(stage2_content["output_dir"])
    (run / "run.json").unlink()
    return recipe, max(run.rglob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[-1]))


def test_pickles_that_older_trainers_wrote_are_not_read(resumable: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, checkpoint = resumable
    names = (
        "optimizer.pt",
        "scheduler.pt",
        "scaler.pt",
        "rng_state.pth",
        "rng_state_0.pth",
        "training_args.bin",
        "adapter_model.bin",
    )
    for name in names:
        assert not (checkpoint / name).exists()
        write_bait(checkpoint / name, tmp_path / f"{name}.executed")
    found = run_verb("finetune", recipe, "--resume")
    assert found.code == 0, found.err
    assert f"skipped {checkpoint.name}: adapter_model.bin is not in its manifest" in found.out
    assert list(tmp_path.glob("*.executed")) == []


@pytest.mark.slow
def test_a_pickle_in_the_place_of_a_checkpoint_s_file_is_not_run(resumable: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, checkpoint = resumable
    marker, manifest = tmp_path / "executed", checkpoint / MANIFEST_FILE
    for name in ("adapter_model.safetensors", "state.safetensors", "state.json", "trainer_state.json"):
        assert name in read_manifest(checkpoint)["files"]
        kept, kept_manifest = (checkpoint / name).read_bytes(), manifest.read_bytes()
        write_bait(checkpoint / name, marker)
        forge(manifest, name)
        assert find_damage(checkpoint) is None
        found = run_verb("finetune", recipe, "--resume")
        assert not marker.exists(), name
        assert found.code == 2 or not name.endswith(".safetensors"), name
        (checkpoint / name).write_bytes(kept)
        manifest.write_bytes(kept_manifest)
        (checkpoint.parent.parent / "run.json").unlink(missing_ok=True)


def forge(manifest: Path, name: str) -> None:
    """Make a manifest vouch for a file that was put in another's place."""
    file = manifest.parent / name
    content = json.loads(manifest.read_text())
    content["files"][name] = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    del content["sha256"]
    body = json.dumps(content, indent=2, sort_keys=True)
    content["sha256"] = hashlib.sha256(body.encode()).hexdigest()
    manifest.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


CODE = "import pathlib\npathlib.Path({marker!r}).touch()\nclass Config: pass\n"


@pytest.mark.parametrize("part", ["llm", "vision_tower"])
def test_code_beside_a_model_is_not_imported(
    part: str, parts: Path, stage2_content: dict[str, Any], tmp_path: Path
) -> None:
    folder, marker = Path(shutil.copytree(parts / part, tmp_path / part)), tmp_path / "executed"
    (folder / "evil.py").write_text(CODE.format(marker=str(marker)))
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "AutoProcessor")
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        file = folder / name
        content = json.loads(file.read_text()) if file.is_file() else {}
        if file.is_file():
            file.write_text(json.dumps(content | {"auto_map": dict.fromkeys(names, "evil.Config")}))
    content = stage2_content | {"model": stage2_content["model"] | {part: str(folder)}, "evaluation": None}
    found = run_verb("finetune", write_recipe(tmp_path / "recipe.yaml", content))
    assert not marker.exists()
    assert found.code in (0, 2), found.err
