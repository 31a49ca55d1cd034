"""Verbs run on hostile files, each in a process of its own whose memory is counted; and what hostile files hold."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import resource
import struct
import threading
import traceback
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lora_llava.commands.main import main
from tests.forked import start_process

MEMORY_RISE_MIB = 200
"""More than this a hostile file may not take over a good one."""
HOSTILE_TEXTS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</article></main><iframe src=//evil.example>",
    "' onmouseover='alert(1)",
    "<svg/onload=alert(1)>",
    "javascript:alert(1)",
)


@dataclass(frozen=True)
class Outcome:
    """How a verb ended.

    Attributes:
        code: Exit code; 99 for an exception that a person would see as a traceback.
        out: What it printed.
        err: What it said went wrong, or the traceback.
        rise_mib: By how much its memory rose at most.
    """

    code: int
    out: str
    err: str
    rise_mib: float


def run_verb(*arguments: object, environment: dict[str, str] | None = None, limit: float = 100) -> Outcome:
    """Run a verb in a fresh process, forked from one that has loaded the libraries.

    Args:
        arguments: As on the command line.
        environment: Set in the process.
        limit: Seconds after which it hangs.
    """
    here, there = multiprocessing.Pipe(duplex=False)
    process = start_process(_run, there, [*map(str, arguments)], environment or {})
    there.close()
    try:
        assert here.poll(limit), f"{arguments} did not end in {limit} s"
        return Outcome(*here.recv())
    finally:
        process.kill()
        process.join()
        process.close()
        here.close()


def _run(pipe: Connection, arguments: Sequence[str], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    out, err = io.StringIO(), io.StringIO()
    before = _peak_mib()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(None, list(arguments))
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException:
            code = 99
            traceback.print_exc()
    reported = "\n".join(line.rpartition("\r")[2] for line in err.getvalue().split("\n"))  # without progress bars
    pipe.send((code, out.getvalue(), reported, _peak_mib() - before))


def _peak_mib() -> float:
    """A forked process begins with what its parent held, not with its parent's peak (Linux, kernel/fork.c)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_recipe(file: Path, content: dict[str, Any]) -> Path:
    """Write a recipe; JSON is YAML."""
    file.write_text(json.dumps(content))
    return file


class Bait:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.marker}'",)


@contextlib.contextmanager
def counting_server() -> Iterator[tuple[str, list[str]]]:
    """A server on the loopback interface; gives its address and the paths that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

        do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def png(width: int, height: int, rows: int = 1) -> bytes:
    """A PNG of one colour that claims a size and holds some of its rows."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    row = b"\0" * (1 + 3 * width)
    pixels = b"".join([packer.compress(row) for _ in range(rows)]) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def tiff(width: int, height: int) -> bytes:
    """A TIFF of a few bytes that claims a size."""
    tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, height), (279, 8)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return struct.pack("<2sHI", b"II", 42, 8) + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)


def safetensors(header: bytes, claimed: int | None = None, content: bytes = b"") -> bytes:
    """A safetensors file with any header, of a length that may be a lie."""
    return struct.pack("<Q", len(header) if claimed is None else claimed) + header + content
