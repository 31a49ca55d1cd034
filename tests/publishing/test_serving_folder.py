"""The `serving/` folder of a merge: a template with BOS, and lines that start servers."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from transformers import AutoProcessor

from lora_llava.publishing.merge import merge
from lora_llava.publishing.serving_folder import template_with_bos

Train = Callable[..., Path]
MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Red?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
    {"role": "user", "content": [{"type": "text", "text": " Why? \n"}]},
]


def test_a_merge_writes_the_template_that_vllm_needs_and_its_line(train: Train, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    merge(train(quantization="none", rate=0.01), folder, projector_only=True, console=Console(file=io.StringIO()))
    processor = AutoProcessor.from_pretrained(folder / "base", backend="pil")
    template = (folder / "serving/vllm_chat_template.jinja").read_text()
    written = processor.apply_chat_template(
        MESSAGES, chat_template=template, add_generation_prompt=True, tokenize=False
    )
    plain = processor.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    ids = processor.tokenizer(written, add_special_tokens=False)["input_ids"]
    assert ids == processor.tokenizer(plain)["input_ids"]
    assert ids[0] == processor.tokenizer.bos_token_id
    line = (folder / "serving/serve.sh").read_text().splitlines()[-1]
    assert line == (
        "exec vllm serve base --enable-lora --lora-modules adapter=adapter --max-lora-rank 8 --served-model-name base "
        '--chat-template serving/vllm_chat_template.jinja "$@"'
    )
    assert f"    cd {folder}\n    vllm serve base " in (folder / "serving/README.md").read_text()


def test_a_template_that_writes_bos_itself_gets_none(train: Train) -> None:
    processor = AutoProcessor.from_pretrained(train(quantization="none", rate=0.01), backend="pil")
    processor.chat_template = "{{ bos_token }}" + processor.chat_template
    assert template_with_bos(processor) is None
