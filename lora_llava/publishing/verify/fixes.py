"""The server flag or request field that fixes each fault."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_llava.inference.served.server_facts import Kind
from lora_llava.publishing.serving_folder import SERVING_FOLDER, TEMPLATE_FILE

Fault = Literal[
    "missing BOS",
    "doubled BOS",
    "template replaced",
    "image tokens",
    "no image support",
    "base served",
    "adapter not active",
    "base not quantised",
    "image resized otherwise",
    "wrong stop",
    "rounding",
    "not answered",
    "unexplained",
]


@dataclass(frozen=True)
class ServerFault:
    """One fault of a server.

    Attributes:
        fault: Its name.
        evidence: What shows it.
        fix: What to change.
    """

    fault: Fault
    evidence: str
    fix: str


def fix_of(fault: Fault, kind: Kind, folder: str, adapters: tuple[str, ...] = (), stop: str | None = None) -> str:
    """Return the fix of a fault.

    Args:
        fault: The fault.
        kind: The server's software.
        folder: The model's folder.
        adapters: Names under which the server has adapters.
        stop: The text at which answers end, if it is not a token.
    """
    places = (Path(folder), Path(folder).parent)  # merge --projector-only writes the adapter's beside its folder
    found = [place / SERVING_FOLDER / TEMPLATE_FILE for place in places]
    template = next((file for file in found if file.is_file()), found[0])
    known = _LLAMA if kind == "llama.cpp" else _VLLM
    text = known.get(fault) or _ANY[fault]
    if fault == "base served" and adapters:
        text = 'ask for the adapter: "model": "{adapter}" in requests, --server-model {adapter} here'
    if fault == "wrong stop" and stop:
        text = 'send "stop": ["{stop}"] with every request'
    return text.format(
        folder=folder,
        template=str(template) if template.is_file() else f"{SERVING_FOLDER}/{TEMPLATE_FILE} of lora-llava merge",
        adapter=adapters[0] if adapters else "",
        stop=stop,
    )


_ANY: dict[str, str] = {
    "missing BOS": "let the server put BOS in front of the chat template's text",
    "doubled BOS": "let BOS come from the chat template or from the tokenizer, not from both",
    "template replaced": "serve {folder}/chat_template.jinja as the chat template",
    "image tokens": "serve the vision settings of {folder}: config.json and processor_config.json",
    "no image support": "serve the complete LLaVA in {folder}, not its language model alone",
    "base served": "serve {folder}",
    "adapter not active": "load the adapter, or serve a folder of lora-llava merge",
    "base not quantised": "none on the server; to compare with what it serves, add --quantization none here",
    "image resized otherwise": "serve {folder} with its own processor_config.json",
    "wrong stop": "serve {folder}/generation_config.json, whose eos_token_id ends answers",
    "rounding": "none needed, or serve in float32: between two nearly equally likely tokens, rounding decides",
    "not answered": "see the server's log; raise --timeout for a slow one",
    "unexplained": "compare the files that the server loaded with those in {folder}",
}
_VLLM: dict[str, str] = {
    "missing BOS": 'start vLLM with --chat-template {template}, or send "add_special_tokens": true with every request '
    "(lora-llava evaluate --server does)",
    "doubled BOS": 'leave "add_special_tokens": true out of the requests, or serve {folder}/chat_template.jinja',
    "template replaced": "start vLLM with --chat-template {template} (or leave the flag out and serve {folder}), and "
    "send no chat_template in requests",
    "base served": "serve {folder}; or the adapter beside its base: lora-llava merge RUN --output DIR "
    "--projector-only, then vllm serve DIR/base --enable-lora --lora-modules NAME=DIR/adapter, and ask for NAME",
    "adapter not active": "start vLLM with --enable-lora --lora-modules NAME=DIR/adapter --max-lora-rank R, and ask "
    "for NAME; or serve a folder of lora-llava merge",
    "image resized otherwise": "leave --mm-processor-kwargs and mm_processor_kwargs out, serve {folder} with its own "
    "processor_config.json, and send images in their own size",
    "wrong stop": "start vLLM with --generation-config {folder}, whose eos_token_id ends answers",
}
_LLAMA: dict[str, str] = {
    "missing BOS": "start llama-server with --override-kv tokenizer.ggml.add_bos_token=bool:true, or convert {folder} "
    "again with its tokenizer.model",
    "doubled BOS": "start llama-server with --override-kv tokenizer.ggml.add_bos_token=bool:false, or with "
    "--chat-template-file {folder}/chat_template.jinja",
    "template replaced": "start llama-server with --jinja --chat-template-file {folder}/chat_template.jinja",
    "image tokens": "convert the vision part of {folder} again, and start llama-server with --mmproj FILE",
    "no image support": "start llama-server with --mmproj FILE, the vision part of {folder}",
    "base served": "convert and serve {folder}, or start llama-server with --lora ADAPTER.gguf",
    "adapter not active": "start llama-server with --lora ADAPTER.gguf, and set its scale to 1 (POST /lora-adapters)",
    "image resized otherwise": "convert the vision part of {folder} again (its image size and padding are in the "
    "mmproj file), and send images in their own size",
    "wrong stop": "convert {folder} again, so that the file has its end-of-turn token",
}
