"""Models that cannot be trained are refused by check, plan and finetune: one line each, and exit code 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from lora_llava.commands.main import main
from lora_llava.model import start
from lora_llava.model.weights import parts as model_parts
from tests.model.small_families import make_tower
from tests.training.small_pairs import make_model

VERBS = ("check", "plan", "finetune")
Refused = Callable[..., str]


@pytest.fixture
def refused(stage2_content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Gives the one line with which every verb refuses a model of two folders."""
    del stage2_content["data"]["system_prompt"]
    stage2_content["data"]["max_length"] = 600

    def message(llm: Path | str, tower: Path | str | None = None, verbs: tuple[str, ...] = VERBS, **data: Any) -> str:
        tower = tower or make_tower(tmp_path / "tower", "clip")
        model = stage2_content["model"] | {"llm": str(llm), "vision_tower": str(tower)}
        file = tmp_path / "recipe.yaml"
        file.write_text(json.dumps(stage2_content | {"model": model, "data": stage2_content["data"] | data}))
        found = set()
        for verb in verbs:
            capsys.readouterr()
            assert main(verb, [str(file)]) == 2, verb
            lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
            assert len(lines) == 1, verb
            found.add(lines[0].removeprefix("error: "))
        assert len(found) == 1
        assert not (tmp_path / "run").exists()
        return found.pop()

    return message


def edited(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_language_model_without_a_chat_template(refused: Refused, tmp_path: Path) -> None:
    llm = make_model(tmp_path / "llm", "qwen2")
    (llm / "chat_template.jinja").unlink()
    message = refused(llm)
    assert message.startswith("data.template is auto, but the language model has no chat template; name the one that")
    assert "chatml" in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "which is not a token of its vocabulary"),
        ("{% for m in messages %}{{ m['content'] }", "refuses it: "),
        ("{{ raise_exception('Not for chat') }}", "refuses it: Not for chat"),
        ("{{ messages[-1]['content'] + '<|im_end|>' }}", "writes what comes before answer"),
        ("<|im_start|>hello<|im_end|>", "changes or drops answers"),
    ],
)
def test_a_chat_template_that_cannot_be_trained(refused: Refused, tmp_path: Path, text: str, reason: str) -> None:
    llm = make_model(tmp_path / "llm", "qwen2")
    (llm / "chat_template.jinja").write_text(text)
    message = refused(llm)
    assert message.startswith("data.template is auto, but the model's chat template ")
    assert reason in message
    assert "data.template, such as" in message


def test_a_system_text_that_the_template_has_no_place_for(refused: Refused, tmp_path: Path) -> None:
    llm = make_model(tmp_path / "llm", "mistral")
    message = refused(llm, system_prompt="Be brief.")
    assert message.startswith("data.system_prompt is set, but the model's chat template refuses it: ")
    assert message.endswith("; leave data.system_prompt out, or name a data.template")


def test_an_empty_system_text_leaves_nothing_out_where_there_is_no_place_for_one(
    stage2_content: dict[str, Any], tmp_path: Path
) -> None:
    llm = make_model(tmp_path / "llm", "mistral")
    stage2_content["model"] |= {"llm": str(llm), "vision_tower": str(make_tower(tmp_path / "tower", "clip"))}
    (tmp_path / "recipe.yaml").write_text(json.dumps(stage2_content))
    assert main("plan", [str(tmp_path / "recipe.yaml")]) == 0


def test_rows_with_a_role_that_the_template_has_no_place_for(
    refused: Refused, stage2_content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = make_model(tmp_path / "llm", "mistral")
    turns = [("system", "Be brief."), ("user", "What is it?"), ("assistant", "A dog.")]
    rows = [{"id": "7", "messages": [{"role": role, "content": text} for role, text in turns]}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    del stage2_content["evaluation"]
    message = refused(llm, verbs=("finetune",), format="conversations", path=str(tmp_path / "rows.json"))
    assert "row 7" in message
    assert "the model's chat template refuses it: " in message
    assert main("check", [str(tmp_path / "recipe.yaml")]) == 1
    assert "refused by the template" in capsys.readouterr().out


def test_a_tokenizer_of_another_model(refused: Refused, tmp_path: Path) -> None:
    llm = make_model(tmp_path / "llm", "qwen2")
    make_model(tmp_path / "other", "llama3")
    edited(llm / "config.json", vocab_size=len(json.loads((llm / "tokenizer.json").read_text())["model"]["vocab"]) - 9)
    message = refused(llm)
    assert "tokens that the model has no row for, such as" in message
    assert message.endswith("the tokenizer belongs to another model")


def test_no_tokenizer(refused: Refused, tmp_path: Path) -> None:
    llm = make_model(tmp_path / "llm", "qwen2")
    for file in llm.glob("*token*"):
        file.unlink()
    assert refused(llm).startswith(f"{llm} has no tokenizer (")


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
@pytest.mark.parametrize("part", ["llm", "tower"])
def test_a_damaged_config(refused: Refused, tmp_path: Path, part: str, content: str) -> None:
    folders = {"llm": make_model(tmp_path / "llm", "qwen2"), "tower": make_tower(tmp_path / "tower", "clip")}
    (folders[part] / "config.json").write_text(content)
    message = refused(folders["llm"], folders["tower"])
    assert message.startswith(f"model.{'llm' if part == 'llm' else 'vision_tower'}: ")
    assert "config.json" in message


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("llm", "tokenizer.json"),
        ("llm", "tokenizer_config.json"),
        ("llm", "generation_config.json"),
        ("tower", "preprocessor_config.json"),
    ],
)
def test_other_damaged_files(refused: Refused, tmp_path: Path, part: str, name: str) -> None:
    folders = {"llm": make_model(tmp_path / "llm", "llama3"), "tower": make_tower(tmp_path / "tower", "siglip")}
    file = folders[part] / name
    assert file.is_file()
    file.write_text('{"')
    assert str(file if name != "tokenizer.json" else folders[part]) in refused(*folders.values())


def test_a_tower_without_a_grid_of_patches(refused: Refused, tmp_path: Path) -> None:
    tower = make_tower(tmp_path / "tower", "siglip")
    content = json.loads((tower / "config.json").read_text())
    edited(tower / "config.json", vision_config=content["vision_config"] | {"patch_size": 64})
    message = refused(make_model(tmp_path / "llm", "phi3"), tower)
    assert message == "model.vision_tower: image_size 28 and patch_size 64 give no grid of patches"


def test_a_model_of_images_as_the_language_model(refused: Refused, tmp_path: Path) -> None:
    llm = make_model(tmp_path / "llm", "qwen2")
    edited(llm / "config.json", model_type="qwen2_vl", vision_config={})
    assert refused(llm).startswith("model.llm is a 'qwen2_vl' model with a vision_config, which is more than a langu")


def test_a_tower_as_the_language_model_and_the_other_way_round(refused: Refused, tmp_path: Path) -> None:
    llm, tower = make_model(tmp_path / "llm", "qwen2"), make_tower(tmp_path / "tower", "clip")
    assert refused(llm, llm).startswith("model.vision_tower is a 'qwen2' model; the towers that work are")
    assert refused(tower, tower).startswith("model.llm")


@pytest.mark.parametrize("kind", [GatedRepoError, RepositoryNotFoundError])
def test_a_repository_that_the_hub_keeps_back(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    def keep_back(*_: Any, **__: Any) -> Any:
        raise kind("401 Client Error.\n\nCannot access it.", response=httpx2.Response(401, request=request))

    request = httpx2.Request("GET", "https://huggingface.co/meta-llama/Llama-3.1-8B-Instruct")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for owner, name in ((model_parts, "hf_hub_download"), (model_parts, "snapshot_download"), (HfApi, "model_info")):
        monkeypatch.setattr(owner, name, keep_back)
    monkeypatch.setattr(HfApi, "list_repo_files", keep_back)
    monkeypatch.setattr(start, "snapshot_download", keep_back)
    message = refused("meta-llama/Llama-3.1-8B-Instruct")
    assert message.startswith("model.llm: meta-llama/Llama-3.1-8B-Instruct is neither a folder")
    assert "log in with `hf auth login`" in message
    gated = "accept its licence on https://huggingface.co/meta-llama/Llama-3.1-8B-Instruct"
    assert (gated in message) == (kind is GatedRepoError)


def test_a_folder_that_is_gone(refused: Refused, tmp_path: Path) -> None:
    llm = make_model(tmp_path / "llm", "qwen2")
    shutil.rmtree(llm)
    assert refused(llm).startswith(f"model.llm: the folder {llm} is missing")
