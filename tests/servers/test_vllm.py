"""The demo through a real vLLM: the answers of the run, and planted faults that `verify` names."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from servers.vllm_server import servers, vllm

from lora_llava.commands.main import main
from lora_llava.inference.client.client import ChatServer
from lora_llava.publishing.merge import merge
from lora_llava.publishing.verify.verify import verify

pytestmark = pytest.mark.servers


@pytest.fixture(scope="module")
def run() -> Path:
    """Return a finished run of the demo, which LORA_LLAVA_DEMO_RUN names."""
    servers()
    folder = os.environ.get("LORA_LLAVA_DEMO_RUN")
    if not folder:
        pytest.skip("LORA_LLAVA_DEMO_RUN names no finished run of demo_scienceqa_qlora")
    return Path(folder)


def faults(model: Path, url: str, name: str | None = None, **fields: object) -> list[str]:
    found = verify(str(model), ChatServer(url, name, timeout=300, fields=fields))
    return [finding.fault for finding in found.findings]


def texts(file: Path) -> dict[str, str]:
    return {row["question_id"]: row["text"] for row in map(json.loads, file.read_text().splitlines())}


def test_the_merged_demo_answers_as_the_run(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "merged"
    merge(run, folder, dtype="float32", console=Console(file=io.StringIO()))
    with vllm(folder, "--trust-request-chat-template", "--trust-request-mm-kwargs") as url:
        assert faults(folder, url) == []
        own = (folder / "chat_template.jinja").read_text()
        assert faults(folder, url, chat_template=own) == ["missing BOS"]
        assert faults(folder, url, add_special_tokens=True) == ["doubled BOS"]
        assert faults(folder, url, chat_template="<s> " + own.replace('"USER: "', '"Human: "')) == ["template replaced"]
        assert faults(folder, url, mm_processor_kwargs={"size": {"shortest_edge": 32}}) == ["image resized otherwise"]
        assert main(None, ["evaluate", str(folder), "--server", url, "--output", str(tmp_path / "out")]) == 0
    assert texts(tmp_path / "out/predictions_server.jsonl") == texts(run / "predictions_after.jsonl")


def test_the_adapter_beside_its_base(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    merge(run, folder, dtype="float32", projector_only=True, console=Console(file=io.StringIO()))
    off = Path(shutil.copytree(folder / "adapter", folder / "off"))
    config = json.loads((off / "adapter_config.json").read_text())
    (off / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 0}))
    with vllm(folder, "--lora-modules", "adapter=adapter", "off=off") as url:
        assert faults(folder / "adapter", url, "adapter") == []
        assert faults(folder / "adapter", url, "base") == ["base served"]
        assert faults(folder / "adapter", url, "off") == ["adapter not active"]
