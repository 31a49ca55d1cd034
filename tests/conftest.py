"""Small real models and data, made here: no test needs a network, a GPU or a file that is not in the repository."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run in two processes; more threads than cores stand in their way

import pytest
from hypothesis import HealthCheck, settings
from inference.chat_server import ChatLog, chat_server
from PIL import Image

from tests.once import once
from tests.tiny_tower import tiny_tower

if TYPE_CHECKING:  # the process that distributes the tests to others would wait for these
    from lora_llava.recipe import Recipe

# How fast a machine is, or what else runs on it, is no property of the code.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

COLOURS = {"red": (220, 30, 30), "blue": (30, 60, 220), "green": (30, 160, 60)}


# Run in the background, a shell lets its commands pass over Ctrl-C, and what they start as well.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_LLAVA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: at the end, one of the two processes would otherwise wait for the other."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


_frozen_at = 0


@pytest.fixture(scope="module", autouse=True)
def _libraries_are_frozen() -> None:
    """Leave the objects of loaded libraries out of garbage collections.

    A training run collects twice. With the 700,000 objects of torch, transformers and the tests, this took half of a
    small run's time.
    """
    global _frozen_at
    if len(sys.modules) > _frozen_at + 50:
        gc.collect()
        gc.freeze()
        _frozen_at = len(sys.modules)


@pytest.fixture(scope="module", autouse=True)
def _seeded_file() -> None:
    _seed()


@pytest.fixture(autouse=True)
def _seeded_test(_seeded_file: None) -> None:
    _seed()


def _seed() -> None:
    """Make a model with random weights independent of the tests before it, which differ between processes."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `llm` and `vision_tower`: random weights, the demo's tokenizer."""
    return once(tmp_path_factory, "parts", _write_parts)


def _write_parts(folder: Path) -> None:
    import torch
    from transformers import CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    from lora_llava.demo.build import build_tokenizer

    torch.manual_seed(0)
    tokenizer = build_tokenizer(0)
    tokenizer.save_pretrained(folder / "llm")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "llm")
    vision = tiny_tower()
    CLIPVisionModel(vision).to(torch.bfloat16).save_pretrained(folder / "vision_tower")


@pytest.fixture(scope="session")
def scienceqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ScienceQA folder in the official layout: 24 train, 6 val, 6 test rows, every second with an image."""
    folder = tmp_path_factory.mktemp("scienceqa")
    problems: dict[str, Any] = {}
    splits: dict[str, list[str]] = {}
    for split, count in (("train", 24), ("val", 6), ("test", 6)):
        splits[split] = []
        for index in range(count):
            pid = str(len(problems) + 1)
            names = list(COLOURS)
            colour = names[index % 3]
            image = "image.png" if index % 2 == 0 else None
            if image:
                (folder / "images" / split / pid).mkdir(parents=True)
                Image.new("RGB", (32, 24), COLOURS[colour]).save(folder / "images" / split / pid / image)
            problems[pid] = {
                "question": "Which colour is shown?",
                "choices": names,
                "answer": index % 3,
                "hint": "" if image else f"The colour is {colour}.",
                "image": image,
                "task": "closed choice",
                "grade": f"grade{index % 12 + 1}",
                "subject": "natural science",
                "topic": "physics",
                "category": "colours",
                "skill": "Name colours",
                "lecture": "" if index % 4 else "Colours have names.",
                "solution": f"It is {colour}.",
                "split": split,
            }
            splits[split].append(pid)
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps(splits))
    return folder


@pytest.fixture(scope="session")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `chat.json` of 16 captions with images."""
    folder = tmp_path_factory.mktemp("captions")
    (folder / "images").mkdir()
    rows = []
    for index in range(16):
        colour = list(COLOURS)[index % 3]
        Image.new("RGB", (32, 32), COLOURS[colour]).save(folder / "images" / f"{index}.png")
        turns = [
            {"from": "human", "value": "What is shown?\n<image>"},
            {"from": "gpt", "value": f"the colour {colour}."},
        ]
        rows.append({"id": str(index), "image": f"{index}.png", "conversations": turns})
    (folder / "chat.json").write_text(json.dumps(rows))
    return folder / "chat.json"


@pytest.fixture
def stage2_content(parts: Path, scienceqa: Path, tmp_path: Path) -> dict[str, Any]:
    """Content of a small Stage 2 recipe."""
    return {
        "stage": 2,
        "output_dir": str(tmp_path / "run"),
        "model": {
            "llm": str(parts / "llm"),
            "vision_tower": str(parts / "vision_tower"),
            "start_from": {"untrained": True},
        },
        "lora": {"r": 4, "alpha": 8},
        "data": {"format": "scienceqa", "path": str(scienceqa), "max_length": 400, "system_prompt": ""},
        "training": {"batch_size": 4, "learning_rate": 5e-3, "max_steps": 4, "eval_every": 2, "log_every": 1},
        "evaluation": {"max_new_tokens": 4},
    }


@pytest.fixture
def stage1_content(stage2_content: dict[str, Any], captions: Path, tmp_path: Path) -> dict[str, Any]:
    """Content of a small Stage 1 recipe over the same parts."""
    return {
        "stage": 1,
        "output_dir": str(tmp_path / "stage1"),
        "model": stage2_content["model"] | {"quantization": "none"},
        "data": {
            "format": "captions",
            "path": str(captions),
            "template": "plain",
            "max_length": 400,
            "validation_rows": 4,
        },
        "training": {"batch_size": 4, "learning_rate": 5e-3, "max_steps": 3, "log_every": 1},
    }


@pytest.fixture
def stage2(stage2_content: dict[str, Any]) -> Recipe:
    """The small Stage 2 recipe."""
    from lora_llava.recipe.io import check_recipe

    return check_recipe(stage2_content, "test")


@pytest.fixture
def stage1(stage1_content: dict[str, Any]) -> Recipe:
    """The small Stage 1 recipe."""
    from lora_llava.recipe.io import check_recipe

    return check_recipe(stage1_content, "test")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatLog]:
    """A chat server on the loopback interface, what it is to do, and what it saw."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with chat_server() as log:
        yield log
