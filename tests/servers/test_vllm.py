"""The demo through a real vLLM: the answers of the run, and planted faults that `verify` names."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from servers.started import evaluated, texts, vllm

from lora_llava.core.errors import UserError
from lora_llava.inference.client.client import ChatServer
from lora_llava.publishing.import_llava import import_llava
from lora_llava.publishing.merge import merge
from lora_llava.publishing.verify.verify import verify
from tests.publishing.llava_tiles import OwnLlava

pytestmark = pytest.mark.servers


def faults(model: Path, url: str, name: str | None = None, **fields: Any) -> list[str]:
    server = ChatServer(url, name, timeout=300, fields=fields)
    return [finding.fault for finding in verify(str(model), server, quantization="none").findings]


def test_the_merged_demo_answers_as_the_run(run: Path, merged: Path, tmp_path: Path) -> None:
    with vllm(merged, "--trust-request-chat-template", "--trust-request-mm-kwargs") as url:
        assert faults(merged, url) == []
        own = (merged / "chat_template.jinja").read_text()
        assert faults(merged, url, chat_template=own) == ["missing BOS"]
        assert faults(merged, url, add_special_tokens=True) == ["doubled BOS"]
        assert faults(merged, url, chat_template="<s> " + own.replace('"USER: "', '"Human: "')) == ["template replaced"]
        assert faults(merged, url, mm_processor_kwargs={"size": {"shortest_edge": 32}}) == ["image resized otherwise"]
        with pytest.raises(UserError, match=r"has no model .other.; it has: model"):
            faults(merged, url, "other")
        found = evaluated(merged, tmp_path / "out", "--server", url)
    expected = texts(run / "predictions_after.jsonl")
    assert found == {name: expected[name] for name in found}


def test_a_llava_1_6(parts: Path, tmp_path: Path) -> None:
    own, quiet = OwnLlava(parts / "llm"), Console(file=io.StringIO())
    own.train(newline=True)
    written = own.save_parts(tmp_path / "parts")
    lora = own.save_lora(tmp_path / "lora", written / "llm", written / "tower")
    import_llava(lora, tmp_path / "run", console=quiet)
    merge(tmp_path / "run", tmp_path / "merged", dtype="float32", console=quiet)
    merge(tmp_path / "run", tmp_path / "apart", dtype="float32", projector_only=True, console=quiet)
    with vllm(tmp_path / "merged") as url:
        report = verify(str(tmp_path / "merged"), ChatServer(url, None, timeout=300))
        assert (report.passed, report.findings) == (True, [])
        assert report.table["prompt ids equal"]["all"] == (12, 12)
    adapter = tmp_path / "apart" / "adapter"
    with vllm(tmp_path / "apart") as url:
        assert faults(adapter, url, "adapter") == []
        assert faults(adapter, url, "base") == ["base served"]


def test_the_adapter_beside_its_base(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    merge(run, folder, dtype="float32", projector_only=True, console=Console(file=io.StringIO()))
    adapter = folder / "adapter"
    off = Path(shutil.copytree(adapter, folder / "off"))
    config = json.loads((off / "adapter_config.json").read_text())
    (off / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 0}))
    with vllm(folder, "--lora-modules", "adapter=adapter", "off=off") as url:
        assert faults(adapter, url, "adapter") == []
        assert faults(adapter, url, "base") == ["base served"]
        assert faults(adapter, url, "off") == ["adapter not active"]
        in_nf4 = verify(str(adapter), ChatServer(url, "adapter", timeout=300))
        assert [finding.fault for finding in in_nf4.findings] in ([], ["base not quantised"])
        with pytest.raises(UserError, match=r"serves 3 models: base, adapter, off; name one with --server-model"):
            faults(adapter, url)
        found = evaluated(adapter, tmp_path / "out", "--server", url, "--server-model", "adapter")
    assert found == evaluated(adapter, tmp_path / "here", "model.quantization=none")
