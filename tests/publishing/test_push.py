"""Pushing to a Hub server on the loopback interface: uploads, secrets, and failed connections."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from lora_llava.commands.main import main
from lora_llava.core.errors import UserError
from lora_llava.core.storage import file_hash
from lora_llava.publishing.push import PushError, push

sys.path.insert(0, str(Path(__file__).parent))
from hub import Store, serve

Train = Callable[..., Path]
TOKEN = "hf_" + "aB3" * 12
QUIET = Console(file=io.StringIO(), width=160)


@pytest.fixture
def hub(monkeypatch: Any, tmp_path: Path) -> Iterator[Store]:
    """Start a Hub server for this process's huggingface_hub, with a token."""
    with serve() as (store, endpoint):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        store.endpoint = endpoint  # type: ignore[attr-defined]
        yield store


@pytest.fixture(scope="module")
def merged(merge_once: Callable[..., tuple[Path, str]]) -> Path:
    return merge_once()[0]


def pushed(folder: Path, repo_id: str = "me/model", **options: Any) -> str:
    stream = io.StringIO()
    push(folder, repo_id, console=Console(file=stream, width=200), **options)
    return stream.getvalue()


MODEL_FILES = {
    ".gitattributes",
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "loss_curve.png",
    "merge_report.json",
    "metrics.json",
    "model.safetensors",
    "processor_config.json",
    "recipe.yaml",
    "run.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def test_a_merged_model_arrives_complete_and_private(merged: Path, hub: Store) -> None:
    output = pushed(merged)
    assert hub.private == {"me/model": True}
    assert set(hub.repos["me/model"]) == MODEL_FILES
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        assert hub.repos["me/model"][name] == (merged / name).read_bytes()
    assert "pushed 13 files" in output
    pushed(merged, "me/open", public=True)
    assert hub.private["me/open"] is False


def test_a_repeated_push_uploads_nothing(merged: Path, hub: Store) -> None:
    pushed(merged)
    commit, files = hub.commits["me/model"], hub.repos["me/model"]
    assert hub.uploaded > 10**6
    hub.reset()
    assert "is up to date; nothing was uploaded" in pushed(merged)
    assert hub.uploaded == 0
    assert not any("/commit/" in request or request.startswith("PUT") for request in hub.requests)
    assert (hub.commits["me/model"], hub.repos["me/model"]) == (commit, files)


def test_a_push_that_fails_at_any_request_can_be_resumed(merged: Path, hub: Store) -> None:
    pushed(merged, "me/complete")
    complete, count = hub.repos["me/complete"], len(hub.requests)
    assert count >= 8
    objects = dict(hub.objects)
    for number in range(1, count + 1):
        hub.repos.clear()
        hub.objects.clear()
        hub.reset(dead_from=number)
        with pytest.raises(PushError, match=r"me/complete: .*; run the same command again to\s+resume"):
            pushed(merged, "me/complete")
        assert set(hub.repos.get("me/complete", {})) <= {".gitattributes"}  # never half a model
        hub.reset()
        pushed(merged, "me/complete")
        assert {name: data for name, data in hub.repos["me/complete"].items() if name != "README.md"} == {
            name: data for name, data in complete.items() if name != "README.md"
        }
        assert hub.repos["me/complete"]["README.md"] == complete["README.md"]
        assert hub.objects == objects


def test_files_uploaded_before_a_failure_are_not_uploaded_again(merged: Path, hub: Store) -> None:
    pushed(merged)
    commit = next(i for i, request in enumerate(hub.requests, 1) if "/commit/" in request)
    hub.repos.clear()
    hub.objects.clear()
    hub.reset(dead_from=commit)
    with pytest.raises(PushError):
        pushed(merged)
    assert hub.uploaded > 10**6
    hub.reset()
    pushed(merged)
    assert hub.uploaded == 0


STOCK = """
import sys, json
sys.modules['lora_llava'] = None
import torch
from PIL import Image
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor
found = []
for name, base in json.loads(sys.argv[1]):
    model = AutoModelForImageTextToText.from_pretrained(base or name, dtype=torch.float32)
    if base:
        model = PeftModel.from_pretrained(model, name)
    processor = AutoProcessor.from_pretrained(name)
    messages = [{'role': 'user', 'content': [{'type': 'image', 'image': Image.open('image.png')},
        {'type': 'text', 'text': 'Which colour is shown?'}]}]
    batch = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors='pt')
    with torch.no_grad():
        logits = model.eval()(**batch, use_cache=False).logits
        found.append((logits, model.generate(**batch, max_new_tokens=5, do_sample=False)))
torch.save(found, sys.argv[2])
"""


def environment(hub: Store, folder: Path) -> dict[str, str]:
    """Return the environment of a user with the Hub and a token, but without this package's settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "LORA_"))}
    own = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}  # type: ignore[attr-defined]
    return kept | own


def stock(models: list[tuple[str, str]], hub: Store, folder: Path) -> Any:
    """Return logits and greedy answer of models and their bases, from a process without this package."""
    Image.new("RGB", (40, 24), (220, 30, 30)).save(folder / "image.png")
    command = [sys.executable, "-c", STOCK, json.dumps(models), str(folder / "out.pt")]
    done = subprocess.run(command, cwd=folder, env=environment(hub, folder), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "out.pt")


def test_downloaded_logits_equal_the_local_ones_bit_for_bit(
    merged: Path, train: Train, hub: Store, tmp_path: Path
) -> None:
    pushed(merged)
    pushed(train(), "me/adapter", base_repo="me/base")
    base = json.loads((train() / "run.json").read_text())["base"]["name"]
    models = [("me/model", ""), (str(merged), ""), ("me/adapter", "me/base"), (str(train()), base)]
    model_there, model_here, adapter_there, adapter_here = stock(models, hub, tmp_path)
    assert all(map(torch.equal, model_there, model_here))
    assert all(map(torch.equal, adapter_there, adapter_here))
    assert any("GET /me/model/resolve/" in request and "model.safetensors" in request for request in hub.requests)


def test_the_cards_snippets_run(merged: Path, train: Train, hub: Store, tmp_path: Path) -> None:
    pushed(merged)
    pushed(train(), "me/adapter", base_repo="me/base")
    program = ["import sys", "sys.modules['lora_llava'] = None"]
    for kind in ("model", "adapter"):
        card = hub.repos[f"me/{kind}"]["README.md"].decode()
        (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
        program.append(f"exec({code!r}, {{}})")
    Image.new("RGB", (40, 24), (220, 30, 30)).save(tmp_path / "image.png")
    command = [sys.executable, "-c", "\n".join(program)]
    done = subprocess.run(command, cwd=tmp_path, env=environment(hub, tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_adapter_names_its_pushed_base_and_commit(train: Train, hub: Store) -> None:
    pushed(train(), "me/adapter", base_repo="me/base")
    config = json.loads(hub.repos["me/adapter"]["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/base", hub.commits["me/base"])
    assert set(hub.repos["me/adapter"]) == {
        ".gitattributes",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "generation_config.json",
        "loss_curve.png",
        "metrics.json",
        "processor_config.json",
        "recipe.yaml",
        "run.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    hub.reset()
    assert pushed(train(), "me/adapter", base_repo="me/base").count("nothing was uploaded") == 2
    assert hub.uploaded == 0


def test_an_adapter_on_a_local_base_is_not_pushed_alone(train: Train, hub: Store) -> None:
    with pytest.raises(UserError, match="is a local folder, which others do not have; push a merged folder"):
        pushed(train())
    assert hub.requests == []


def test_another_model_is_not_overwritten_automatically(merged: Path, train: Train, hub: Store) -> None:
    pushed(merged)
    files = hub.repos["me/model"]
    with pytest.raises(UserError, match=r"me/model has another model \(README\.md, .*; files: 13\); .*--replace"):
        pushed(train(), base_repo="me/base")
    assert hub.repos["me/model"] == files
    output = pushed(train(), base_repo="me/base", replace=True)
    assert "removed files of an earlier push: config.json, merge_report.json, model.safetensors" in output
    assert "model.safetensors" not in hub.repos["me/model"]
    hub.repos["me/notes"] = {"notes.txt": b"mine"}
    hub.commits["me/notes"], hub.private["me/notes"] = "0" * 40, True
    with pytest.raises(UserError, match="has another model"):
        pushed(merged, "me/notes")


def test_adapter_and_base_need_different_repositories(train: Train, merged: Path, hub: Store) -> None:
    with pytest.raises(UserError, match=r"nothing does not exist"):
        pushed(Path("nothing"), "me/adapter", base_repo="me/base")
    with pytest.raises(UserError, match="--base-repo: me/model is the adapter's own repository; choose another"):
        pushed(train(), base_repo="me/model")
    assert hub.requests == []
    pushed(merged, "me/other")
    with pytest.raises(UserError, match="me/other has another model"):
        pushed(train(), "me/other", base_repo="me/base")
    assert "me/base" not in hub.repos  # nothing is uploaded for an adapter that is rejected
    with pytest.raises(UserError, match="me/other has another model"):
        pushed(train(), "me/adapter", base_repo="me/other", replace=True)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_damaged_file_is_not_pushed(name: str, merged: Path, hub: Store, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(merged, tmp_path / "damaged"))
    (folder / name).write_bytes((folder / name).read_bytes()[:5000] if "model" in name else b'{"a": 1}')
    with pytest.raises(UserError, match=r"is truncated or damaged|its processor or tokenizer cannot be loaded"):
        pushed(folder)
    assert hub.requests == []


def test_a_run_without_recipe_is_pushed_without_a_table(finished: Path, hub: Store) -> None:
    (finished / "recipe.yaml").unlink()
    pushed(finished, base_repo="me/base")
    assert b"## Results" not in hub.repos["me/model"]["README.md"]


def test_files_added_by_a_person_are_kept(merged: Path, hub: Store) -> None:
    pushed(merged)
    hub.repos["me/model"] |= {"LICENSE": b"mine", "model.gguf": b"x", "preprocessor_config.json": b"{}"}
    output = pushed(merged)
    assert set(hub.repos["me/model"]) == MODEL_FILES | {"LICENSE", "model.gguf"}
    assert "removed files of an earlier push: preprocessor_config.json" in output
    assert "kept other files: LICENSE, model.gguf" in output


def test_a_folder_without_a_record_is_identified_by_its_weights(merged: Path, hub: Store, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(merged, tmp_path / "bare"))
    for name in ("run.json", "recipe.yaml", "metrics.json", "merge_report.json"):
        (folder / name).unlink()
    pushed(folder)
    assert "nothing was uploaded" in pushed(folder)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="has another model"):
        pushed(folder)


def test_a_retrained_run_of_the_same_recipe_replaces_the_old_one(finished: Path, hub: Store) -> None:
    pushed(finished, base_repo="me/base")
    file = finished / "adapter_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    record = json.loads((finished / "run.json").read_text()) | {"adapter_sha256": file_hash(file)}
    (finished / "run.json").write_text(json.dumps(record))
    assert "pushed 12 files" in pushed(finished, base_repo="me/base")
    (finished / "run.json").write_text(json.dumps(record | {"recipe_hash": "0" * 64}))
    with pytest.raises(UserError, match="has another model"):
        pushed(finished, base_repo="me/base")


def test_no_token_and_no_network_are_one_line(merged: Path, hub: Store, monkeypatch: Any, capsys: Any) -> None:
    hub.refuse_token = True
    assert main("push", [str(merged), "me/model"]) == 1
    message = capsys.readouterr().err
    assert "me/model: the Hub rejected the upload (401: " in message
    assert "check that the token has write access" in message
    assert TOKEN not in message
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("lora_llava.publishing.push.get_token", lambda: None)
    assert main("push", [str(merged), "me/model"]) == 2
    assert "no Hub token was found; run `hf auth login`" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main("push", [str(merged), "me/model"]) == 2
    assert "HF_HUB_OFFLINE is set; unset it to push" in capsys.readouterr().err
    for name in ("a/b/c", "model", "me/bad name"):
        assert main("push", [str(merged), name]) == 2
        assert name in capsys.readouterr().err


def test_a_dry_run_uploads_nothing_and_prints_files_and_card(merged: Path, hub: Store) -> None:
    output = pushed(merged, dry_run=True)
    assert hub.requests == []
    for name in MODEL_FILES - {".gitattributes"}:
        assert name in output
    assert "# model" in output


SECRET = "hf_" + "zZ9" * 12


def plant_in_weights(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file), file, {"format": "pt", "note": SECRET})


def plant_in(name: str, text: str) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        content["note"] = text
        (folder / name).write_text(json.dumps(content))

    return plant


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (plant_in("tokenizer_config.json", f"use {SECRET}"), "tokenizer_config.json, line 1: a Hugging Face token"),
        (plant_in("run.json", f"key {SECRET}"), "run.json, line "),
        (plant_in("metrics.json", "/home/alice/images/cat.jpg"), "a path into a home"),
        (plant_in("processor_config.json", "C:\\Users\\alice\\x"), "a path into a home"),
        (plant_in("generation_config.json", "https://me:secret@example.com"), "a password in a URL"),
        (plant_in("adapter_config.json", "sk-" + "a1B2" * 8), "an OpenAI key"),
        (plant_in("metrics.json", "/mnt/team/images/cat.jpg"), "a local path"),
        (plant_in_weights, "adapter_model.safetensors, line 1: a Hugging Face token"),
    ],
)
def test_a_planted_secret_stops_the_push(
    plant: Callable[[Path], None], message: str, finished: Path, hub: Store, capsys: Any
) -> None:
    plant(finished)
    for options in ([], ["--dry-run"]):
        assert main("push", [str(finished), "me/model", "--base-repo", "me/base", *options]) == 2
        seen = "".join(capsys.readouterr())
        assert message in seen
        assert "remove it, then push again" in seen
        assert SECRET not in seen
        assert "alice" not in seen
    assert hub.requests == []


def test_local_paths_of_the_recipe_are_not_uploaded(finished: Path, hub: Store, tmp_path: Path) -> None:
    (finished / "training_args.bin").write_bytes(TOKEN.encode())
    (finished / "logs").mkdir(exist_ok=True)
    (finished / "logs" / "events").write_text(TOKEN)
    pushed(finished, base_repo="me/base")
    sent = b"".join(hub.received) + b"".join(data for files in hub.repos.values() for data in files.values())
    for private in (TOKEN.encode(), str(tmp_path).encode(), b"pytest-of", str(Path.home()).encode() + b"/"):
        assert private not in sent
    recipe = hub.repos["me/model"]["recipe.yaml"].decode()
    assert "path: scienceqa" in recipe
    assert "output_dir: run\n" in recipe
