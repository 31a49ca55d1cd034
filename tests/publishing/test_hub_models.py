"""A model by its Hub id: evaluation and chat give the same results as the pushed folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.publishing.hub import Store
from tests.publishing.test_push import environment, hub, merged, pushed

__all__ = ["hub", "merged"]


def run(arguments: list[str], hub: Store, folder: Path) -> str:
    command = [sys.executable, "-m", "lora_llava.commands.main", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment(hub, folder), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.more
@pytest.mark.slow
def test_a_hub_id_answers_as_its_folder(merged: Path, hub: Store, tmp_path: Path) -> None:
    pushed(merged)
    recipe = ["--recipe", str(merged / "recipe.yaml"), "model.quantization=none", "--json"]
    tables = [
        json.loads(run(["evaluate", name, *recipe, "--output", str(tmp_path / kind)], hub, tmp_path))
        for kind, name in (("here", str(merged)), ("there", "me/model"))
    ]
    assert tables[0] == tables[1]
    assert tables[0]["AVG"][2] == 6
    here, there = (next((tmp_path / kind).glob("predictions*.jsonl")).read_text() for kind in ("here", "there"))
    assert here == there
    Image.new("RGB", (40, 24), (220, 30, 30)).save(tmp_path / "image.png")
    prompt = ["--image", "image.png", "--prompt", "What is it?", "--max-new-tokens", "8"]
    assert run(["chat", "me/model", *prompt], hub, tmp_path) == run(["chat", str(merged), *prompt], hub, tmp_path)
    assert any("GET /me/model/resolve/" in request and "model.safetensors" in request for request in hub.requests)
