"""`verify` names the fault of a server that runs the real model with one fault planted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from inference.chat_server import ChatLog
from PIL import Image
from publishing.served_model import ServedModel, load_served, serving

from lora_llava.commands.main import main
from lora_llava.data.templates.named_templates import TEMPLATES, chat_template
from lora_llava.inference.client.client import ChatServer
from lora_llava.publishing.verify import verify as verification
from lora_llava.publishing.verify.verify import VerifyReport, verify

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def small(train: Train) -> Path:
    return train(quantization="none", rate=0.01)


@pytest.fixture(scope="module")
def loaded(small: Path) -> ServedModel:
    return load_served(small)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(verification, "MAX_NEW_TOKENS", 12)


def verified(model: Path, served: ServedModel, **options: Any) -> VerifyReport:
    with serving(served) as url:
        return verify(
            str(model), ChatServer(url, options.pop("name", None), timeout=60, retries=0), questions=6, **options
        )


def half(image: Image.Image) -> Image.Image:
    """Return the image at half its size within a black frame; the small ones have one colour."""
    frame = Image.new("RGB", (2 * image.width, 2 * image.height))
    frame.paste(image, (image.width // 2, image.height // 2))
    return frame


def faults(report: VerifyReport) -> list[str]:
    return [finding.fault for finding in report.findings]


def test_a_server_that_answers_as_the_model_here(small: Path, loaded: ServedModel) -> None:
    report = verified(small, loaded)
    assert (faults(report), report.passed, report.differing) == ([], True, 0)
    assert report.table["prompt ids equal"] == dict.fromkeys(
        ("with image", "without image", "several turns"), (2, 2)
    ) | {"all": (6, 6)}
    assert report.logprob_difference is not None
    assert report.logprob_difference < 1e-4


PLANTED: dict[str, dict[str, Any]] = {
    "missing BOS": {"adds_bos": False},
    "base served": {"base_only": True},
    "template replaced": {"template": chat_template(TEMPLATES["vicuna_v0"])},
    "image resized otherwise": {"change_image": half},
}


@pytest.mark.parametrize("gives", [("ids", "logprobs"), pytest.param(("logprobs",), marks=pytest.mark.more)])
@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_named_and_no_other(
    small: Path, loaded: ServedModel, fault: str, gives: tuple[str, ...]
) -> None:
    report = verified(small, replace(loaded, gives=gives, **PLANTED[fault]))
    assert faults(report) == [fault]


def test_an_adapter_that_a_server_has_and_does_not_use(small: Path, loaded: ServedModel) -> None:
    names = {"names": ["base", "mine"], "parents": {"mine": "base"}}
    report = verified(small, replace(loaded, base_only=True, **names), name="mine")
    assert faults(report) == ["adapter not active"]
    assert "--lora-modules" in report.findings[0].fix


def test_the_base_asked_beside_its_adapter(small: Path, loaded: ServedModel) -> None:
    names = {"names": ["base", "mine"], "parents": {"mine": "base"}}
    report = verified(small, replace(loaded, base_only=True, **names), name="base")
    assert faults(report) == ["base served"]
    assert report.findings[0].fix == 'ask for the adapter: "model": "mine" in requests, --server-model mine here'


def test_a_field_that_adds_bos_is_tried(small: Path, loaded: ServedModel) -> None:
    report = verified(small, replace(loaded, adds_bos=False))
    assert report.with_bos_field == 6
    assert "add_special_tokens" in report.findings[0].fix


def test_bos_twice_and_a_missing_stop(small: Path, loaded: ServedModel) -> None:
    served = replace(loaded, gives=("logprobs",))
    with serving(served) as url:
        server = ChatServer(url, timeout=60, retries=0, fields={"add_special_tokens": True})
        assert faults(verify(str(small), server, questions=3)) == ["doubled BOS"]


def test_a_server_without_images_says_so(small: Path, loaded: ServedModel) -> None:
    report = verified(small, replace(loaded, reads_images=False))
    assert faults(report)[0] == "no image support"
    assert "image input is not supported" in report.findings[0].evidence
    assert not report.passed


def test_a_share_of_differing_answers_may_be_stated(
    small: Path, loaded: ServedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(replace(loaded, base_only=True)) as url:
        common = ["verify", str(small), "--server", url, "--questions", "3", "--json"]
        assert main(None, common) == 1
        assert main(None, [*common, "--max-differ", "1"]) == 0
    first = json.loads(capsys.readouterr().out.split("\n}\n")[0] + "\n}")
    assert first["passed"] is False
    assert [finding["fault"] for finding in first["findings"]] == ["base served"]


def test_a_model_without_recipe_gets_built_in_questions(small: Path, loaded: ServedModel, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(small, tmp_path / "bare"))
    (bare / "recipe.yaml").unlink()
    report = verified(bare, loaded)
    assert report.questions_from == "built-in, since the model has no recipe"
    assert faults(report) == []


USAGE = {
    "two models": (["a", "b"], [], "serves 2 models: a, b; name one with --server-model"),
    "none": ([], [], "has no model; load one there"),
    "another": (["judge"], ["--server-model", "jugde"], "has no model 'jugde' (did you mean \"judge\"?)"),
}


@pytest.mark.parametrize("case", USAGE)
def test_a_server_without_the_model(
    log: ChatLog, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    log.models, flags, message = USAGE[case]
    assert main(None, ["verify", str(tmp_path), "--server", log.url, *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_server_that_stalls(log: ChatLog, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log.behave = lambda body, count: "stall"
    code = main(None, ["verify", str(small), "--server", log.url, "--timeout", "0.2", "--questions", "3"])
    assert code == 2
    assert "answered none of 3 questions (no answer within 0.2 s); raise --timeout" in capsys.readouterr().err


def test_no_server(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(None, ["verify", str(small), "--server", "http://127.0.0.1:9/v1"]) == 2
    assert "cannot be reached" in capsys.readouterr().err


def test_evaluate_adds_bos_only_where_the_server_lacks_it(
    small: Path, loaded: ServedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sent = {}
    cases = {"lacks it": (False, True), "has it": (True, True), "knows no field": (False, False)}
    for name, (adds_bos, takes_field) in cases.items():
        served = replace(loaded, adds_bos=adds_bos, takes_field=takes_field, bodies=[])
        with serving(served) as url:
            command = ["evaluate", str(small), "--server", url, "--limit", "4", "--output", str(tmp_path / name)]
            assert main(None, command) == 0
        asked = [body for body in served.bodies if body["max_tokens"] > 1]
        sent[name] = {body.get("add_special_tokens", False) for body in asked}, len(asked)
        said = capsys.readouterr().err
        assert ("add_special_tokens=true is sent" in said) == (name == "lacks it")
        assert ("warning: a prompt has" in said and "(missing BOS)" in said) == (name == "knows no field")
    assert sent == {"lacks it": ({True}, 4), "has it": ({False}, 4), "knows no field": ({False}, 4)}
