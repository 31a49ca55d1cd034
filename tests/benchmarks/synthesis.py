"""generate-data against a loopback server: requests a second of the ideal, and the same with a tenth of faults."""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import multiprocessing
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
_SPOKEN = "It is a dog, with its head turned to the left, and near it on the grass lies ball {}."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--latency", type=float, default=0.05, help="seconds of the server for an answer")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole verb, from contexts to files; the ideal is concurrency over latency. The server is a process of its
    own."""
    good, faulty = _made(args.samples, 0.0, args.latency), _made(args.samples, 0.1, args.latency)
    ideal = CONCURRENCY / args.latency
    return {
        "samples": args.samples, "concurrency": CONCURRENCY, "latency_seconds": args.latency,
        "ideal_requests_per_second": ideal, "requests_per_second": good["requests_per_second"],
        "share_of_ideal": good["requests_per_second"] / ideal, "without_faults": good, "a_tenth_faults": faulty,
    }  # fmt: skip


def _made(samples: int, faults: float, latency: float) -> dict[str, Any]:
    from lora_llava.recipe.generate import ContextsSection, FlavoursSection, GenerateRecipe, TeacherSection
    from lora_llava.synthesis.generate import generate

    context = multiprocessing.get_context("spawn")
    seen = context.Array("d", 4)  # port, first request, last answer, answers
    server = context.Process(target=_serve, args=(seen, faults, latency))
    server.start()
    while not seen[0]:
        time.sleep(0.01)
    with tempfile.TemporaryDirectory() as folder:
        recipe = GenerateRecipe(
            output_dir=f"{folder}/set", contexts=ContextsSection(contexts=_contexts(Path(folder), samples)),
            flavours=FlavoursSection(conversation=1, detail=0, reasoning=0),
            teacher=TeacherSection(
                url=f"http://127.0.0.1:{int(seen[0])}/v1", model="m", concurrency=CONCURRENCY, timeout=1.0, retries=8
            ),
        )  # fmt: skip
        summary = generate(recipe, console=Console(file=io.StringIO()))
        rows = json.loads(Path(folder, "set", "instruct.json").read_text())
        listed = [json.loads(line) for line in Path(folder, "set", "rejected.jsonl").read_text().splitlines()]
    _, first, last, answers = seen
    server.terminate()
    server.join()
    ends = [line for line in listed if line.get("given_up") or line["reason"] in ("failed", "not asked")]
    ids = Counter([row["id"] for row in rows] + [line["task_id"] for line in ends])
    return {
        "requests_per_second": answers / (last - first), "seconds": last - first, "answers": int(answers),
        "rows": summary["rows"], "listed": len(ends), "twice": sum(count > 1 for count in ids.values()),
        "lost": samples - len(ids),
    }  # fmt: skip


def _contexts(folder: Path, count: int) -> str:
    file = folder / "contexts.jsonl"
    rows = [
        {
            "image": f"{n:06}.jpg", "captions": [f"A dog near ball {n}.", f"A dog on the grass beside ball {n}."],
            "instances": [
                {"category": "dog", "bbox": [0.1, 0.2, 0.3, 0.4]},
                {"category": "sports ball", "bbox": [0.5, 0.3, 0.6, 0.5]},
            ],
        }
        for n in range(count)
    ]  # fmt: skip
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(file)


def _serve(seen: Any, faults: float, latency: float) -> None:
    """As little as an HTTP server can do, so that the client is what is measured."""
    drawn = random.Random(0)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                body = await reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
                seen[1] = seen[1] or time.time()
                await asyncio.sleep(latency)
                fault = drawn.choice(FAULTS) if drawn.random() < faults else None
                if fault == "stall":
                    await asyncio.sleep(3600)
                writer.write(_reply(body, fault))
                await writer.drain()
                if fault == "cut":
                    break
                seen[2], seen[3] = time.time(), seen[3] + (fault is None)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        seen[0] = server.sockets[0].getsockname()[1]
        await server.serve_forever()

    asyncio.run(main())


def _reply(body: bytes, fault: str | None) -> bytes:
    number = re.findall(rb"beside ball (\d+)", body)[-1].decode()
    turns = [
        {"question": "Which animal is shown?", "answer": _SPOKEN.format(number)},
        {"question": "What lies near it?", "answer": f"Ball {number} lies on the grass near the dog."},
    ]
    message = {"role": "assistant", "content": json.dumps({"turns": turns})}
    usage = {"prompt_tokens": 900, "completion_tokens": 60, "total_tokens": 960}
    content = json.dumps(
        {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "usage": usage,
         "choices": [{"index": 0, "finish_reason": "stop", "message": message}]}
    ).encode()  # fmt: skip
    if fault == "malformed":
        content = content[: len(content) // 2]
    if fault in ("429", "500"):
        content = b'{"error": {"message": "try again"}}'
    status = f"{fault} Fault" if fault in ("429", "500") else "200 OK"
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + (content[:40] if fault == "cut" else content)
