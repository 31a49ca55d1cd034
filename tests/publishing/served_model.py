"""A loopback server that answers with a real small model through stock transformers, as vLLM does, with a fault."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


@dataclass
class ServedModel:
    """A model and how it is served.

    Attributes:
        model: The base with its adapter.
        processor: Its stock processor.
        names: Names of the models.
        parents: By name, the base of an adapter.
        adds_bos: Whether prompts get BOS without being asked for it.
        takes_field: Whether it knows `add_special_tokens`.
        template: Jinja text in place of the processor's.
        base_only: Whether the adapter is left out.
        change_image: Applied to every image.
        reads_images: Whether it takes images.
        ends: Whether answers end at EOS.
        gives: Which of `ids` and `logprobs` it reports.
        url: The API's URL.
        bodies: Requests for answers.
    """

    model: Any
    processor: Any
    names: list[str] = field(default_factory=lambda: ["small"])
    parents: dict[str, str] = field(default_factory=dict)
    adds_bos: bool = True
    takes_field: bool = True
    template: str | None = None
    base_only: bool = False
    change_image: Callable[[Image.Image], Image.Image] = lambda image: image
    reads_images: bool = True
    ends: bool = True
    gives: tuple[str, ...] = ("ids", "logprobs")
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)

    def ids(self, body: dict[str, Any]) -> tuple[list[int], list[Image.Image]]:
        """Tokenize messages; BOS is added beside the template's text, never recognised in it."""
        images: list[Image.Image] = []
        messages = [{**message, "content": self.parts(message["content"], images)} for message in body["messages"]]
        template = self.template or self.processor.chat_template
        text = self.processor.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, tokenize=False
        )
        bos = self.adds_bos + bool(body.get("add_special_tokens") and self.takes_field)
        first, *rest = text.split("<image>")
        counts = [len(self.processor(text="<image>", images=[image])["input_ids"][0]) - 1 for image in images]
        text = first + "".join("<image>" * count + piece for count, piece in zip(counts, rest, strict=True))
        found = self.processor.tokenizer(text, add_special_tokens=False)
        start = self.processor.tokenizer("")["input_ids"]
        return start * bos + found["input_ids"], images

    def parts(self, content: Any, images: list[Image.Image]) -> list[dict[str, Any]]:
        if isinstance(content, str):
            return [{"type": "text", "text": content}]
        found: list[dict[str, Any]] = []
        for part in content:
            if part["type"] == "text":
                found.append(part)
                continue
            if not self.reads_images:
                raise ValueError("image input is not supported")
            data = base64.b64decode(part["image_url"]["url"].split(",")[1])
            images.append(self.change_image(Image.open(io.BytesIO(data))))
            found.append({"type": "image"})
        return found

    @torch.inference_mode()
    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        ids, images = self.ids(body)
        batch: dict[str, Any] = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}
        if images:
            batch |= dict(self.processor.image_processor(images, return_tensors="pt"))
        eos = self.processor.tokenizer.eos_token_id
        with self.model.disable_adapter() if self.base_only else nullcontext():
            out = self.model.generate(
                **batch,
                do_sample=False,
                max_new_tokens=min(body["max_tokens"], 12),
                eos_token_id=eos if self.ends else None,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            )
        new = out.sequences[0, len(ids) :].tolist()
        logprobs = [float(row[0].log_softmax(-1)[token]) for row, token in zip(out.logits, new, strict=True)]
        choice: dict[str, Any] = {
            "index": 0,
            "finish_reason": "stop" if new[-1] == eos else "length",
            "message": {"role": "assistant", "content": self.processor.decode(new, skip_special_tokens=True)},
        }
        if body.get("logprobs") and "logprobs" in self.gives:
            choice["logprobs"] = {"content": [{"token": "", "logprob": value} for value in logprobs]}
        if body.get("return_token_ids") and "logprobs" in self.gives:
            choice["token_ids"] = new
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(new)}
        return {"id": "1", "model": body["model"], "choices": [choice], "usage": usage}


class _Handler(BaseHTTPRequestHandler):
    served: ServedModel
    lock = threading.Lock()

    def do_GET(self) -> None:
        served = self.served
        models = [{"id": n, "owned_by": "vllm", "parent": served.parents.get(n)} for n in served.names]
        self.reply(200, {"object": "list", "data": models})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            with self.lock:
                if self.path.endswith("/chat/completions"):
                    self.served.bodies.append(body)
                    self.reply(200, self.served.answer(body))
                elif self.path == "/tokenize" and "ids" in self.served.gives:
                    self.reply(200, {"tokens": self.served.ids(body)[0]})
                else:
                    self.reply(404, {})
        except ValueError as error:
            self.reply(400, {"error": {"message": str(error)}})

    def reply(self, status: int, content: Any) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args: Any) -> None:
        pass


def load_served(run: Path) -> ServedModel:
    """Load a run by stock transformers and PEFT."""
    base = json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(run, backend="pil")
    return ServedModel(PeftModel.from_pretrained(model, run).eval(), processor)


@contextmanager
def serving(served: ServedModel) -> Iterator[str]:
    """Serve a model within the block, and yield its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("ServedHandler", (_Handler,), {"served": served}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
