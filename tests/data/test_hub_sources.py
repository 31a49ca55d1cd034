"""Data on the Hub: a real server on the loopback interface stands for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pytest
from PIL import Image

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "me/data-1.5"


class Hub(BaseHTTPRequestHandler):
    """Serves one data set."""

    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_POST(self) -> None:
        wanted = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.do_GET(wanted=wanted)

    def do_GET(self, body: bool = True, wanted: str = "") -> None:
        self.asked.append(f"{self.command} {self.path}")
        path = self.path.split("?")[0].replace("%2F", "/")
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": sha1(data).hexdigest()}
            for name, data in self.files.items()
        ]
        if f"/datasets/{REPO}/resolve/" in path and (name := path.split("/", 6)[6].split("/", 0)[0]) in self.files:
            self.answer(self.files[name], body, "application/octet-stream")
        elif path.startswith(f"/api/datasets/{REPO}/paths-info/"):
            asked = [entry for entry in entries if entry["path"] in wanted]
            self.answer(json.dumps(asked).encode(), body, "application/json")
        elif path.startswith(f"/api/datasets/{REPO}/tree/"):
            self.answer(json.dumps(entries).encode(), body, "application/json")
        elif path == f"/api/datasets/{REPO}" or path.startswith(f"/api/datasets/{REPO}/revision/"):
            siblings = [{"rfilename": name} for name in self.files]
            content = {"id": REPO, "sha": COMMIT, "siblings": siblings, "private": False, "gated": False}
            self.answer(json.dumps(content).encode(), body, "application/json")
        else:
            self.send_response(404)
            missing = "EntryNotFound" if REPO in path else "RepoNotFound"
            self.send_header("X-Error-Code", missing)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def answer(self, data: bytes, body: bool, kind: str) -> None:
        headers = {"Content-Type": kind, "X-Repo-Commit": COMMIT, "ETag": f'"{sha1(data).hexdigest()}"'}
        start, end = 0, len(data)
        if "Range" in self.headers:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            start, end = int(first), int(last) + 1 if last else end
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        self.send_response(206 if "Range" in self.headers else 200)
        for key, value in {**headers, "Content-Length": str(end - start)}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data[start:end])

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment of a process whose Hub is on the loopback interface; it has a JSON file and a table with images."""
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    Hub.files = {"rows.json": json.dumps([{"id": "7", "image": "a.png", "conversations": turns}]).encode()}
    Image.new("RGB", (9, 9), (1, 2, 3)).save(tmp_path / "a.png")
    image = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    rows = [{"image": image, "question": f"What is {n}?", "answer": "Red."} for n in range(3)]
    rows.append({"image": None, "question": "And now?", "answer": "Nothing."})
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "table.parquet")
    Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    yield environment | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "TABLE": str(tmp_path / "table.parquet"),
    }
    server.shutdown()
    server.server_close()


CODE = """
import json, sys
from lora_llava.data.sources import open_source
from lora_llava.core.errors import UserError
path, options = json.loads(sys.argv[1])
try:
    source = open_source(path, **options)
    rows = list(source.read())
    first = rows[0]
    pixel = source.images.open(first.images[0]).getpixel((0, 0)) if options.get("file") is None else None
    print(json.dumps([[row.row_id, row.turns[0].text, list(row.images)] for row in rows] + [pixel]))
except UserError as error:
    print(error)
"""


def opened(environment: dict[str, str], path: str, **options: Any) -> str:
    command = [sys.executable, "-W", "ignore", "-c", CODE, json.dumps([path, options])]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_a_file_of_a_repository_is_fetched_once(hub: dict[str, str]) -> None:
    expected = [["7", "<image>\nWhat?", ["a.png"]], None]
    assert json.loads(opened(hub, REPO, file="rows.json")) == expected
    asked = len(Hub.asked)
    assert json.loads(opened(hub | {"HF_HUB_OFFLINE": "1"}, REPO, file="rows.json")) == expected
    assert len(Hub.asked) == asked


def test_a_file_or_repository_that_is_not_there_is_one_line(hub: dict[str, str]) -> None:
    for path, file in ((REPO, "gone.json"), ("me/gone", "rows.json")):
        reported = opened(hub, path, file=file)
        assert reported.startswith(f"data.path: {file} of {path} cannot be downloaded from the Hub: ")
        assert "\n" not in reported


def test_a_table_with_images_is_read(hub: dict[str, str]) -> None:
    Hub.files = {"train-00000-of-00001.parquet": Path(hub["TABLE"]).read_bytes()}
    found = json.loads(opened(hub, REPO))
    assert found == [
        *([str(n), f"<image>\nWhat is {n}?", [str(n)]] for n in range(3)),
        ["3", "And now?", []],
        [1, 2, 3],
    ]
    reported = opened(hub, "me/gone")
    assert reported.startswith("data.path: me/gone, split 'train', cannot be read: ")
    assert "\n" not in reported
