"""The shipped base model matches `build-demo`, is small, and answers questions about written scenes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from rich.progress import Progress
from transformers import AutoTokenizer, LlamaForCausalLM

from lora_llava.demo import corpus
from lora_llava.demo.build import build_tokenizer, encode_texts, llm_config, near_misses, train_llm
from lora_llava.demo.world import random_scene
from lora_llava.model.weights.parts import DEMO_FOLDER
from lora_llava.model.weights.tensor_files import iterate_tensors


def test_the_base_is_at_most_eight_megabytes_of_safetensors() -> None:
    files = [file for file in DEMO_FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 8 * 2**20
    assert {file.suffix for file in files} == {".safetensors", ".json"}


def test_tokenizer_and_tensor_shapes_match_the_code() -> None:
    shipped = json.loads((DEMO_FOLDER / "llm" / "tokenizer.json").read_text())["model"]
    built = json.loads(build_tokenizer(0).backend_tokenizer.to_str())["model"]
    assert shipped["vocab"] == built["vocab"]
    assert shipped["merges"] == built["merges"]
    shapes = {name: tensor.shape for name, tensor in iterate_tensors(DEMO_FOLDER / "llm")}
    with torch.device("meta"):
        expected = LlamaForCausalLM(llm_config(len(built["vocab"])))
    assert shapes == {name: tensor.shape for name, tensor in expected.state_dict().items()}


def test_answers_questions_about_written_scenes() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_FOLDER / "llm", pad_token="<unk>")
    model = LlamaForCausalLM.from_pretrained(DEMO_FOLDER / "llm", dtype=torch.float32)
    rng = random.Random(11)
    right = 0
    for _ in range(8):
        texts = [corpus._scene_question(random_scene(rng, "test"), rng) for _ in range(16)]
        batch = encode_texts(texts, tokenizer)
        labels = batch.pop("labels")[:, 1:]
        with torch.no_grad():
            predicted = model(**batch).logits[:, :-1].argmax(-1)
        right += int(((predicted == labels) | (labels == -100)).all(1).sum())
    assert right >= 115  # of 128, every token right


def test_pre_training_is_reproducible(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(0)
    tokenizer.pad_token = "<unk>"
    with Progress(disable=True) as progress:
        first, second = (train_llm(tokenizer, 3, 2, progress).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_near_misses_differ_from_their_scene_in_one_way() -> None:
    rng = random.Random(4)
    for _ in range(200):
        scene, moved, reshaped, turned = near_misses(random_scene(rng), rng)
        assert sum(a not in moved.things for a in scene.things) == 1
        assert sum(a not in reshaped.things for a in scene.things) == 1
        assert {t.colour for t in turned.things} == {t.colour for t in scene.things}
