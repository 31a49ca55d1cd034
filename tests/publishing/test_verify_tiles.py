"""`verify` of a LLaVA-1.6, whose images have as many tokens as their sizes give them."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from publishing.served_model import ServedModel, load_served, serving
from rich.console import Console

from lora_llava.inference.client.client import ChatServer
from lora_llava.publishing.import_llava import import_llava
from lora_llava.publishing.merge import merge
from lora_llava.publishing.verify import verify as verification
from lora_llava.publishing.verify.verify import VerifyReport, verify
from tests.publishing.llava_tiles import OwnLlava

QUIET = Console(file=io.StringIO(), width=160)


@pytest.fixture(scope="module")
def run(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with LoRA, projector and newline of its own."""
    folder, own = tmp_path_factory.mktemp("tiles"), OwnLlava(parts / "llm")
    own.train(newline=True)
    written = own.save_parts(folder)
    import_llava(own.save_lora(folder / "lora", written / "llm", written / "tower"), folder / "run", console=QUIET)
    return folder / "run"


@pytest.fixture(scope="module")
def loaded(run: Path) -> ServedModel:
    return load_served(run)


def verified(model: Path, served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> VerifyReport:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(verification, "MAX_NEW_TOKENS", 12)
    with serving(served) as url:
        return verify(str(model), ChatServer(url, None, timeout=60, retries=0), questions=6)


def half(image: Image.Image) -> Image.Image:
    return image.resize((image.width // 2, image.height // 2))


def beside_itself(image: Image.Image) -> Image.Image:
    """Return a wide image, which has another canvas and so another number of tokens."""
    wide = Image.new("RGB", (3 * image.width, image.height))
    wide.paste(image)
    return wide


CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "equal": ({}, []),
    "half": ({"change_image": half}, ["image resized otherwise"]),
    "wide": ({"change_image": beside_itself}, ["image tokens"]),
    "base": ({"base_only": True}, ["base served"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_fault_is_named_and_no_other(
    case: str, run: Path, loaded: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, faults = CASES[case]
    report = verified(run, replace(loaded, **changes), monkeypatch)
    assert [finding.fault for finding in report.findings] == faults
    if not faults:
        assert report.table["prompt ids equal"]["all"] == (6, 6)
        assert report.passed
        assert report.logprob_difference is not None
        assert report.logprob_difference < 1e-4


def test_a_merged_folder_is_compared_too(
    run: Path, loaded: ServedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(run, tmp_path / "merged", dtype="float32", console=QUIET)
    assert verified(tmp_path / "merged", loaded, monkeypatch).passed
    report = verified(tmp_path / "merged", replace(loaded, base_only=True), monkeypatch)
    assert [finding.fault for finding in report.findings] == ["base served"]
