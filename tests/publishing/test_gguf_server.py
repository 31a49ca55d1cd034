"""The demo as GGUF in llama.cpp's own server: prompt ids and accuracy."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from lora_llava.commands.main import main

pytestmark = pytest.mark.servers
_CODE = """
import sys, time, xllamacpp as x
p = x.CommonParams(); p.model.path, p.mmproj.path = sys.argv[1:3]
p.hostnames = ["127.0.0.1"]; p.port = int(sys.argv[3])
p.n_ctx = 2048; p.n_parallel = 1; p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
p.use_jinja = p.offline = True; p.ui = p.warmup = False
server = x.Server(p)
while True: time.sleep(60)
"""


def post(url: str, content: Any) -> Any:
    request = urllib.request.Request(url, json.dumps(content).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def folder() -> Path:
    """A merged demo, named by LORA_LLAVA_SERVED_MODEL."""
    if not (os.environ.get("LORA_LLAVA_SERVERS") and os.environ.get("LORA_LLAVA_SERVED_MODEL")):
        pytest.skip("LORA_LLAVA_SERVERS and LORA_LLAVA_SERVED_MODEL name the folder of setup.sh and a merged demo")
    return Path(os.environ["LORA_LLAVA_SERVED_MODEL"])


@pytest.fixture(scope="module", params=["f16", "q8_0"])
def server(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    output = tmp_path_factory.mktemp("gguf") / "out"
    assert main("export", [str(folder), "--format", "gguf", "--output", str(output), "--quant", request.param]) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    python = Path(os.environ["LORA_LLAVA_SERVERS"]) / "llama" / "bin" / "python"
    files = [str(output / name) for name in (f"model-{request.param}.gguf", "mmproj-f16.gguf")]
    with (output / "log").open("wb") as log:
        process = subprocess.Popen([str(python), "-c", _CODE, *files, str(port)], stdout=log, stderr=log)
        try:
            for _ in range(120):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                except (urllib.error.URLError, ConnectionError):
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(20)


def test_prompt_ids_of_several_turns_equal_ours(server: str, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which  shape?\n\n(A) é 😀"}]
    messages += [{"role": "assistant", "content": "The answer is A."}, {"role": "user", "content": " Why?"}]
    written = render_jinja_template([messages], chat_template=template, add_generation_prompt=True)[0][0]
    prompt = post(f"{server}/apply-template", {"messages": messages})["prompt"]
    found = post(f"{server}/tokenize", {"content": prompt, "add_special": True, "parse_special": True})["tokens"]
    has_bos = written.startswith(tokenizer.bos_token)
    assert found == tokenizer(written, add_special_tokens=not has_bos)["input_ids"]


def test_accuracy_is_within_half_a_point(server: str, folder: Path, tmp_path: Path) -> None:
    flags = [str(folder), "--server", server, "--concurrency", "1", "--output", str(tmp_path)]
    assert main("evaluate", flags) == 0
    found = json.loads((tmp_path / "evaluation_server.json").read_text())["table"]["AVG"]
    correct, asked = json.loads((folder / "metrics.json").read_text())["after"]["AVG"][1:]
    assert found["count"] == asked
    assert abs(found["correct"] - correct) / asked <= 0.005
