"""Measure requests per second of generate-data against a loopback server, without faults and with 10% faults."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import multiprocessing
import os
import random
import re
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console

CONCURRENCY = 32
FAULTS = ("429", "500", "stall", "cut", "malformed")
_SENTENCE = "It is a dog, with its head turned to the left, and near it on the grass lies ball 17."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=int, default=6000)
    parser.add_argument("--latency", type=float, default=0.05, help="seconds that the server takes for an answer")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the complete verb, from contexts to files, and take the median of five runs.

    The ideal rate is concurrency over latency. The server runs in a separate process.
    """
    runs = sorted(
        (_measure(args.samples, 0.0, args.latency) for _ in range(5)), key=lambda run: run["requests_per_second"]
    )
    good, faulty = runs[2], _measure(args.samples, 0.1, args.latency)
    ideal = CONCURRENCY / args.latency
    return {
        "samples": args.samples,
        "concurrency": CONCURRENCY,
        "latency_seconds": args.latency,
        "ideal_requests_per_second": ideal,
        "requests_per_second": good["requests_per_second"],
        "share_of_ideal": good["requests_per_second"] / ideal,
        "shares_of_all_runs": [run["requests_per_second"] / ideal for run in runs],
        "without_faults": good,
        "a_tenth_faults": faulty,
    }


def _measure(samples: int, faults: float, latency: float) -> dict[str, Any]:
    from lora_llava.recipe.generate_schema import ContextsSection, FlavoursSection, GenerateRecipe, TeacherSection
    from lora_llava.synthesis.generation import generate

    context = multiprocessing.get_context("spawn")
    seen = context.Array("d", 4, lock=False)  # port, first request, last answer, answers
    server = context.Process(target=_serve, args=(seen, faults, latency))
    server.start()
    while not seen[0]:
        time.sleep(0.01)
    with tempfile.TemporaryDirectory() as folder:
        recipe = GenerateRecipe(
            output_dir=f"{folder}/set",
            contexts=ContextsSection(contexts=_contexts(Path(folder), samples)),
            flavours=FlavoursSection(conversation=1, detail=0, reasoning=0),
            teacher=TeacherSection(
                url=f"http://127.0.0.1:{int(seen[0])}/v1", model="m", concurrency=CONCURRENCY, timeout=1.0, retries=8
            ),
        )
        summary = generate(recipe, console=Console(file=io.StringIO()))
        rows = json.loads(Path(folder, "set", "instruct.json").read_text())
        listed = [json.loads(line) for line in Path(folder, "set", "rejected.jsonl").read_text().splitlines()]
    _, first, last, answers = seen
    server.terminate()
    server.join()
    ends = [line for line in listed if line.get("given_up") or line["reason"] in ("failed", "not asked")]
    ids = Counter([row["id"] for row in rows] + [line["task_id"] for line in ends])
    return {
        "requests_per_second": answers / (last - first),
        "seconds": last - first,
        "answers": int(answers),
        "rows": summary["rows"],
        "listed": len(ends),
        "twice": sum(count > 1 for count in ids.values()),
        "lost": samples - len(ids),
    }


def _contexts(folder: Path, count: int) -> str:
    file = folder / "contexts.jsonl"
    rows = [
        {
            "image": f"{n:06}.jpg",
            "captions": [f"A dog near ball {n}.", f"A dog on the grass beside ball {n}."],
            "instances": [
                {"category": "dog", "bbox": [0.1, 0.2, 0.3, 0.4]},
                {"category": "sports ball", "bbox": [0.5, 0.3, 0.6, 0.5]},
            ],
        }
        for n in range(count)
    ]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(file)


class _Server(asyncio.Protocol):
    """A minimal HTTP server, so that the client limits the rate."""

    def __init__(self, seen: Any, faults: float, latency: float, drawn: random.Random) -> None:
        self.seen, self.faults, self.latency, self.drawn = seen, faults, latency, drawn
        self.received = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, end, body = self.received.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        if not end or length is None or len(body) < int(length[1]):
            return
        self.received = b""
        self.seen[1] = self.seen[1] or time.time()
        fault = self.drawn.choice(FAULTS) if self.drawn.random() < self.faults else None
        if fault != "stall":
            asyncio.get_running_loop().call_later(self.latency, self.answer, body, fault)

    def answer(self, body: bytes, fault: str | None) -> None:
        if self.transport.is_closing():
            return
        self.transport.write(_reply(body, fault))
        if fault == "cut":
            self.transport.close()
        self.seen[2], self.seen[3] = time.time(), self.seen[3] + (fault is None)


def _serve(seen: Any, faults: float, latency: float) -> None:
    with contextlib.suppress(PermissionError):
        os.nice(-10)  # it represents another machine, which would have its own cores
    drawn = random.Random(0)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Server(seen, faults, latency, drawn), "127.0.0.1", 0)
        seen[0] = server.sockets[0].getsockname()[1]
        await server.serve_forever()

    asyncio.run(main())


def _reply(body: bytes, fault: str | None) -> bytes:
    number = re.compile(rb"\d+").search(body, body.rindex(b"beside ball "))
    assert number is not None
    content = _ANSWER.replace(b"17", number[0])
    if fault == "malformed":
        content = content[: len(content) // 2]
    if fault in ("429", "500"):
        content = b'{"error": {"message": "try again"}}'
    status = f"{fault} Fault" if fault in ("429", "500") else "200 OK"
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + (content[:40] if fault == "cut" else content)


def _answer() -> bytes:
    turns = [
        {"question": "Which animal is shown?", "answer": _SENTENCE},
        {"question": "What lies near it?", "answer": "Ball 17 lies on the grass near the dog."},
    ]
    message = {"role": "assistant", "content": json.dumps({"turns": turns})}
    usage = {"prompt_tokens": 900, "completion_tokens": 60, "total_tokens": 960}
    return json.dumps(
        {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "usage": usage,
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        }
    ).encode()


_ANSWER = _answer()
