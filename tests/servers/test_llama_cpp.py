"""The demo as GGUF in llama.cpp's own server: prompt ids, accuracy, and planted faults that `verify` names."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console
from servers.started import evaluated, llama
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from lora_llava.core.errors import UserError
from lora_llava.inference.client.client import ChatServer
from lora_llava.publishing.gguf.export_gguf import export_gguf
from lora_llava.publishing.gguf.gguf_types import Quant
from lora_llava.publishing.merge import merge
from lora_llava.publishing.verify.verify import verify

pytestmark = pytest.mark.servers
QUIET = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def f16(merged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(merged, tmp_path_factory.mktemp("gguf") / "f16", "f16")


def exported(folder: Path, output: Path, quant: Quant) -> Path:
    export_gguf(folder, output, quant=quant, console=QUIET)
    return output / f"model-{quant}.gguf"


@pytest.fixture(scope="module")
def server(f16: Path) -> Iterator[str]:
    with llama(f16, f16.parent / "mmproj-f16.gguf") as (url, _):
        yield url


def faults(model: Path, url: str, **options: Any) -> list[tuple[str, str]]:
    found = verify(str(model), ChatServer(url, timeout=300, retries=0, **options))
    return [(finding.fault, finding.fix) for finding in found.findings]


def post(url: str, content: Any) -> Any:
    return httpx.post(url, json=content, timeout=60).raise_for_status().json()


def test_prompt_ids_of_several_turns_equal_ours(server: str, merged: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(merged)
    template = (merged / "chat_template.jinja").read_text(encoding="utf-8")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which  shape?\n\n(A) é 😀"}]
    messages += [{"role": "assistant", "content": "The answer is A."}, {"role": "user", "content": " Why?"}]
    written = render_jinja_template([messages], chat_template=template, add_generation_prompt=True)[0][0]
    prompt = post(f"{server}/apply-template", {"messages": messages})["prompt"]
    found = post(f"{server}/tokenize", {"content": prompt, "add_special": True, "parse_special": True})["tokens"]
    has_bos = written.startswith(tokenizer.bos_token)
    assert found == tokenizer(written, add_special_tokens=not has_bos)["input_ids"]


@pytest.mark.parametrize("quant", ["f16", "q8_0"])
def test_at_most_one_answer_more_or_less_is_right(quant: Quant, run: Path, merged: Path, tmp_path: Path) -> None:
    """Of all 480 it is one too: 97.92 against 98.12 percent."""
    model = exported(merged, tmp_path / "gguf", quant)
    with llama(model, model.parent / "mmproj-f16.gguf") as (url, _):
        found = evaluated(merged, tmp_path / "out", "--server", url, "--concurrency", "2")
    rows = list(map(json.loads, (run / "predictions_after.jsonl").read_text().splitlines()))
    [summary] = (tmp_path / "out").glob("evaluation*.json")
    right = sum(row["prediction"] == row["answer"] for row in rows if row["question_id"] in found)
    assert abs(json.loads(summary.read_text())["table"]["AVG"]["correct"] - right) <= 1


def test_verify_finds_no_fault(server: str, merged: Path) -> None:
    assert faults(merged, server) == []


def test_verify_names_a_template_that_was_replaced(f16: Path, merged: Path, tmp_path: Path) -> None:
    template = tmp_path / "other.jinja"
    template.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] ")
    with llama(f16, f16.parent / "mmproj-f16.gguf", template) as (url, _):
        [(fault, fix)] = faults(merged, url)
    assert fault == "template replaced"
    assert "--chat-template" in fix


def test_verify_names_a_server_without_images(f16: Path, merged: Path) -> None:
    with llama(f16, None) as (url, _):
        assert [fault for fault, _ in faults(merged, url)] == ["no image support"]


def test_verify_names_a_model_without_its_lora(run: Path, merged: Path, tmp_path: Path) -> None:
    merge(run, tmp_path / "apart", dtype="float32", projector_only=True, console=QUIET)
    model = exported(tmp_path / "apart/base", tmp_path / "gguf", "f16")
    with llama(model, model.parent / "mmproj-f16.gguf") as (url, _):
        assert [fault for fault, _ in faults(merged, url)] == ["adapter not active"]


def test_verify_reports_a_server_that_stalls(f16: Path, merged: Path) -> None:
    with llama(f16, f16.parent / "mmproj-f16.gguf") as (url, process):
        os.kill(process, signal.SIGSTOP)
        try:
            with pytest.raises(UserError, match="no answer within 3 s"):
                verify(str(merged), ChatServer(url, timeout=3, retries=0), questions=3)
        finally:
            os.kill(process, signal.SIGCONT)
