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

from lora_llava.evaluation.lmms.task_questions import TaskAsker, TaskQuestion, TaskSettings
from lora_llava.inference.client.client import ChatServer
from lora_llava.inference.open_model import open_speaker
from lora_llava.inference.sampling import Sampling
from lora_llava.inference.speak import stream_answer, user_message
from lora_llava.publishing.import_llava import import_llava
from lora_llava.publishing.merge import merge
from lora_llava.publishing.verify import verify as verification
from lora_llava.publishing.verify.verify import VerifyReport, verify
from tests.model.small_tiled import images
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


def test_a_benchmark_s_prompts_are_compared_with_those_of_a_server(
    run: Path, loaded: ServedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    served, shown = replace(loaded, adds_bos=False, bodies=[]), images()
    config = loaded.model.config
    questions = [TaskQuestion(name, "What is shown?", lambda image=image: [image]) for name, image in shown.items()]
    with serving(served) as url:
        asker = TaskAsker(
            None, ChatServer(url, "small", timeout=60), tmp_path, {}, processor=loaded.processor, config=config
        )
        found = asker.generate("tiles", questions, TaskSettings(Sampling(max_new_tokens=8)))
    assert (
        "the server's prompts lack BOS: add_special_tokens=true is sent with every question" in capsys.readouterr().err
    )
    assert all(body["add_special_tokens"] for body in served.bodies[-len(questions) :])
    speaker = open_speaker(str(run))
    assert found == [
        "".join(stream_answer(speaker, [user_message("What is shown?", [image])], Sampling(max_new_tokens=8)))
        for image in shown.values()
    ]
