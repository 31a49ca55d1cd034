"""Exported folders load in a process that cannot import this package."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from lora_llava.data.encode import encode_prompt
from lora_llava.data.templates.named_templates import get_template
from lora_llava.model.tokenizer import load_tokenizer
from lora_llava.publishing.merge import merge

Train = Callable[..., Path]
MergeOnce = Callable[..., tuple[Path, str]]
HEAD = "import sys, json\nsys.modules['lora_llava'] = None\nimport torch\nfrom PIL import Image\n"
MESSAGE = (
    "messages = [{'role': 'user', 'content': [{'type': 'image', 'image': Image.open('image.png')},\n"
    "    {'type': 'text', 'text': 'Which colour is shown?'}]}]\n"
)


def in_process(code: str, folder: Path) -> Any:
    """Run code that sets `found`, in a process without this package."""
    command = [sys.executable, "-c", HEAD + MESSAGE + code + "print(json.dumps(found, default=str))"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def exported(train: Train, merge_once: MergeOnce, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a folder with `merged`, `two/base`, `two/adapter` and an image."""
    folder = tmp_path_factory.mktemp("exported")
    Image.new("RGB", (40, 24), (220, 30, 30)).save(folder / "image.png")
    quiet = Console(file=io.StringIO())
    (folder / "merged").symlink_to(merge_once()[0], target_is_directory=True)
    merge(train(), folder / "two", dtype="float32", projector_only=True, console=quiet)
    return folder


ASK = (
    "from peft import PeftModel\n"
    "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
    "def ask(folder, base=None):\n"
    "    model = AutoModelForImageTextToText.from_pretrained(base or folder, dtype=torch.float32)\n"
    "    model = PeftModel.from_pretrained(model, folder) if base else model\n"
    "    batch = AutoProcessor.from_pretrained(folder).apply_chat_template(messages, add_generation_prompt=True,\n"
    "        tokenize=True, return_dict=True, return_tensors='pt')\n"
    "    with torch.no_grad():\n"
    "        last = model.eval()(**batch, use_cache=False).logits[0, -1]\n"
    "    return {'ids': batch['input_ids'][0].tolist(), 'logits': last.tolist()}\n"
)


def test_adapter_merged_and_adapter_alone_give_the_same_logits(train: Train, exported: Path) -> None:
    base = json.loads((train() / "adapter_config.json").read_text())["base_model_name_or_path"]
    asked = f"found = [ask({str(train())!r}, {base!r}), ask('merged'), ask('two/adapter', 'two/base')]\n"
    run, complete, apart = in_process(ASK + asked, exported)
    assert run["ids"] == complete["ids"] == apart["ids"]
    assert apart["logits"] == run["logits"]
    torch.testing.assert_close(torch.tensor(complete["logits"]), torch.tensor(run["logits"]), rtol=0, atol=1e-4)


def test_the_pipeline_answers_a_chat_message_with_the_trained_prompt(exported: Path) -> None:
    output = in_process(
        "from transformers import pipeline\n"
        "pipe = pipeline('image-text-to-text', model='merged', dtype=torch.float32)\n"
        "seen = []\n"
        "forward = pipe.model.generate\n"
        "pipe.model.generate = lambda **inputs: (seen.append(inputs), forward(**inputs))[1]\n"
        "answer = pipe(text=messages, max_new_tokens=6, do_sample=False)\n"
        "found = {'ids': seen[0]['input_ids'][0].tolist(), 'pixels': list(seen[0]['pixel_values'].shape),\n"
        "    'turns': answer[0]['generated_text']}\n",
        exported,
    )
    prompt = encode_prompt(
        [{"role": "user", "content": "<image>\nWhich colour is shown?"}],
        tokenizer=load_tokenizer(exported / "merged"),
        template=get_template("vicuna_v1", ""),
        num_image_tokens=4,
    )
    assert output["ids"] == prompt
    assert output["pixels"] == [1, 3, 32, 32]
    assert output["turns"][-1]["role"] == "assistant"
