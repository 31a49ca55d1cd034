"""Parts from folders and from a Hub, simulated by a server on the loopback interface."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from lora_llava.core.errors import UserError
from lora_llava.model.weights.parts import load_part, plan_download

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Serves one repository, `vicuna/tiny`, with a text file, safetensors and a pickle."""

    files: ClassVar[dict[str, bytes]] = {}
    requests: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        self.requests.append(f"{self.command} {self.path}")
        path = self.path.split("?")[0]
        if path.startswith("/api/models/vicuna/tiny"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.files.items()]
            content = {"id": "vicuna/tiny", "modelId": "vicuna/tiny", "sha": COMMIT, "siblings": siblings}
            tree = [{"type": "file", "path": n, "size": len(d), "oid": n} for n, d in self.files.items()]
            self.answer(json.dumps(tree if "/tree/" in path else content).encode(), body, "application/json")
        elif path.startswith("/vicuna/tiny/resolve/") and path.rsplit("/", 1)[1] in self.files:
            self.answer(self.files[path.rsplit("/", 1)[1]], body, "application/octet-stream")
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

    def answer(self, data: bytes, body: bool, kind: str) -> None:
        self.send_response(200)
        for key, value in {"Content-Type": kind, "X-Repo-Commit": COMMIT, "ETag": f'"{hash(data)}"'}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def hub(parts: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment of a process whose Hub is on the loopback interface."""
    Hub.files = {file.name: file.read_bytes() for file in (parts / "llm").iterdir()}
    Hub.files["pytorch_model.bin"] = b"a pickle that nobody should fetch"
    Hub.requests = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    yield environment | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf")}
    server.shutdown()
    server.server_close()


def in_process(code: str, environment: dict[str, str]) -> str:
    head = "from lora_llava.model.weights.parts import *; from lora_llava.core.errors import UserError\n"
    command = [sys.executable, "-c", head + code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_a_hub_id_is_planned_fetched_and_then_cached(hub: dict[str, str], parts: Path) -> None:
    wanted = sum(len(data) for name, data in Hub.files.items() if not name.endswith(".bin"))
    plan = "print(plan_download('vicuna/tiny', None, 'llm').missing_bytes)"
    assert in_process(plan, hub) == str(wanted)
    assert not any("resolve" in line for line in Hub.requests)
    fetch = "p = load_part('vicuna/tiny', None, 'llm'); print(p.folder, p.revision)\n"
    folder, revision, missing = in_process(fetch + plan, hub).split()
    assert revision == COMMIT
    fetched = {file.name for file in Path(folder).iterdir()}
    assert fetched == {file.name for file in (parts / "llm").iterdir()}  # safetensors, and not the pickle beside it
    assert missing == "0"
    cached = "print(load_part('vicuna/tiny', None, 'llm').revision, plan_download('vicuna/tiny', None, 'llm').cached)"
    assert in_process(cached, hub | {"HF_HUB_OFFLINE": "1"}) == f"{COMMIT} True"


def test_a_published_projector_is_planned_without_fetching_it(hub: dict[str, str]) -> None:
    Hub.files["mm_projector.bin"] = b"x" * 321
    module = "lora_llava.model.weights.original_projector"
    code = f"from {module} import plan_projector; print(plan_projector('vicuna/tiny', None))"
    assert "missing_bytes=321" in in_process(code, hub)
    assert not any("resolve" in line for line in Hub.requests)


def test_a_missing_repository_is_one_line(hub: dict[str, str]) -> None:
    code = "try: load_part('vicuna/huge', None, 'llm')\nexcept UserError as error: print(error)"
    message = in_process(code, hub)
    assert message.startswith("model.llm: vicuna/huge is neither a folder nor available from the Hub")
    assert "\n" not in message


def test_nothing_touches_the_network_for_a_folder(parts: Path, hub: dict[str, str]) -> None:
    in_process(f"load_part({str(parts / 'llm')!r}, None, 'llm')", hub)
    assert Hub.requests == []


def test_revision_of_a_folder_is_a_hash_of_its_contents(parts: Path, tmp_path: Path) -> None:
    copy = tmp_path / "llm"
    copy.mkdir()
    for file in (parts / "llm").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    revision = load_part(str(parts / "llm"), None, "llm").revision
    assert load_part(str(copy), None, "llm").revision == revision
    (copy / "config.json").write_text("{}")
    assert load_part(str(copy), None, "llm").revision != revision


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        plan_download(str(tmp_path), None, "llm")
