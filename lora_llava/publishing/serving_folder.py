"""The `serving/` folder of a merge: a chat template for servers that lose BOS, and the lines that start them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from lora_llava.data.tokens import leading_ids
from lora_llava.inference.load import load_processor
from lora_llava.inference.prompt import prompt_ids

SERVING_FOLDER, TEMPLATE_FILE, SCRIPT_FILE, README_FILE = "serving", "vllm_chat_template.jinja", "serve.sh", "README.md"
_TURNS = (
    ("user", "Is it red?"),
    ("assistant", "Yes, 2."),
    ("user", "  Two spaces, and\na line. 你好"),
)
_MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank takes (vllm/config/lora.py)."""
_SCRIPT = """#!/bin/sh
# vLLM for this folder. Further flags are passed on: sh serve.sh --port 8000
cd "$(dirname "$0")/.." || exit 1
exec LINE "$@"
"""


def template_with_bos(processor: Any) -> str | None:
    """Return a chat template that writes BOS, for a server that tokenizes without special tokens.

    The ids must be those of training. After a special token, tokenizers of `prepend_scheme: first` put no space in
    front of the text, so that a space is tried too.

    Args:
        processor: A stock processor whose chat template writes no BOS.

    Returns:
        Jinja text; None if the tokenizer adds no BOS, the template writes it already, or none gives the same ids.
    """
    tokenizer, own = processor.tokenizer, processor.chat_template
    bos = tokenizer.bos_token
    if not bos or not own or leading_ids(tokenizer) != [tokenizer.bos_token_id]:
        return None
    turns = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in _TURNS]
    shown = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is shown?"}]}]
    for front in (bos, f"{bos} "):
        template = f"{{{{ {json.dumps(front, ensure_ascii=False)} }}}}{own}"
        if all(
            _ids(processor, messages, template) == prompt_ids(processor, messages, 1) for messages in (turns, shown)
        ):
            return template
    return None


def _ids(processor: Any, messages: list[dict[str, Any]], template: str) -> list[int]:
    """Tokenize as vLLM does: the template's text, without special tokens."""
    written = processor.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, tokenize=False
    )
    return list(processor.tokenizer(written, add_special_tokens=False)["input_ids"])


def write_serving(folder: Path, output: Path, *, rank: int | None) -> None:
    """Write the `serving/` folder.

    Args:
        folder: The folder being written, with the model in it, or in its `base` with the adapter in `adapter`.
        output: The name it gets.
        rank: The LoRA's rank if the adapter is separate, else None.
    """
    model = folder / "base" if rank is not None else folder
    serving = folder / SERVING_FOLDER
    serving.mkdir()
    template = template_with_bos(load_processor(model))
    if template is not None:
        (serving / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    line = vllm_line(rank, with_template=template is not None)
    script = _SCRIPT.replace("LINE", line)
    (serving / SCRIPT_FILE).write_text(script, encoding="utf-8")
    (serving / README_FILE).write_text(_readme(output.resolve(), line, rank, template is not None), encoding="utf-8")


def vllm_line(rank: int | None, *, with_template: bool) -> str:
    """Return the line that starts vLLM from within the folder; see `write_serving`."""
    words = ["vllm serve", "base" if rank is not None else "."]
    if rank is not None:
        most = next((size for size in _MAX_RANKS if size >= rank), rank)
        words.append(f"--enable-lora --lora-modules adapter=adapter --max-lora-rank {most}")
    words.append(f"--served-model-name {'base' if rank is not None else 'model'}")
    if with_template:
        words.append(f"--chat-template {SERVING_FOLDER}/{TEMPLATE_FILE}")
    return " ".join(words)


def _readme(output: Path, line: str, rank: int | None, with_template: bool) -> str:
    model, place = "adapter" if rank is not None else "model", shlex.quote(str(output))
    checked, flags = (place, "") if rank is None else (shlex.quote(str(output / "adapter")), " --quantization none")
    why = (
        f"vLLM tokenizes the chat template's text without BOS, with which the model was trained. `{TEMPLATE_FILE}` "
        'writes it. Do not send `"add_special_tokens": true` besides: BOS would be doubled.\n\n'
        if with_template
        else ""
    )
    gguf = (
        "llama.cpp takes no separate projector with an adapter: merge without `--projector-only` for it.\n"
        if rank is not None
        else (
            f"llama.cpp:\n\n    lora-llava export {place} --format gguf --output GGUF\n\nand then the line that it "
            "prints; the file has the chat template and BOS.\n"
        )
    )
    return (
        f"# Serve this folder\n\nvLLM:\n\n    cd {place}\n    {line}\n\n"
        f"or `sh {SERVING_FOLDER}/{SCRIPT_FILE}`. Ask for the model `{model}`. {why}Check the answers:\n\n"
        f"    lora-llava verify {checked} --server http://localhost:8000 --server-model {model}{flags}\n\n{gguf}"
    )
