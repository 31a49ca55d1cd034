"""`lora-llava build-demo`: pre-train the demo's tokenizer, language model and CLIP vision tower from a seed.

The language model is trained on text alone, the vision tower on images and captions with CLIP's contrastive loss. They
are trained separately: Stages 1 and 2 of the demo recipes connect them.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.progress import Progress
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
    get_cosine_schedule_with_warmup,
    get_wsd_schedule,
)

from lora_llava.core.storage import share
from lora_llava.demo.corpus import Text, random_text, tokenizer_texts
from lora_llava.demo.world import IMAGE_SIZE, PLACES, SHAPES, Scene, caption, draw, random_scene

VOCAB_SIZE = 896
PATCH_SIZE = 16
LLM_STEPS, LLM_BATCH = 4000, 16
CLIP_STEPS, CLIP_SCENES, CLIP_POOL = 3000, 32, 10000


def build_tokenizer(seed: int) -> LlamaTokenizer:
    """Train a Llama-style BPE tokenizer with byte fallback on the corpus.

    Returns:
        A tokenizer that behaves like Vicuna's: Metaspace, and `<unk>`, `<s>`, `</s>` as ids 0, 1, 2.
    """
    specials = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    # Merges stay within one word or one punctuation mark; a newline remains a byte, as in Llama's vocabulary.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "removed"),
            pre_tokenizers.Metaspace(prepend_scheme="first", split=True),
            pre_tokenizers.Split(Regex(r"▁?[^\p{L}▁]"), "isolated"),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[*specials, *byte_tokens],
        initial_alphabet=[chr(code) for code in range(33, 127)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_texts(4000, seed), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return LlamaTokenizer(  # adds BOS, like Vicuna's
        vocab=model["vocab"], merges=merges, add_bos_token=True, model_max_length=2048, padding_side="right"
    )


def llm_config(vocab_size: int) -> LlamaConfig:
    """Return the configuration of the demo's language model, which has 1.8 million parameters."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        initializer_range=0.08,  # about hidden_size**-0.5; the library's 0.02 is for a width of 2,500
    )


def encode_texts(texts: list[list[Text]], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """Encode texts as one padded batch whose labels are the tokens of the answers.

    Returns:
        `input_ids`, `attention_mask` and `labels`, each int64 of shape (batch, longest).
    """
    encodings = tokenizer(["".join(part for turn in turns for part in turn) for turns in texts])
    longest = max(map(len, encodings["input_ids"]))
    input_ids = torch.full((len(texts), longest), 2)
    labels = torch.full((len(texts), longest), -100)
    mask = torch.zeros((len(texts), longest), dtype=torch.long)
    for row, turns in enumerate(texts):
        ids = torch.tensor(encodings["input_ids"][row])
        input_ids[row, : len(ids)] = ids
        mask[row, : len(ids)] = 1
        end = 0
        for prompt, answer in turns:
            start, end = end + len(prompt), end + len(prompt) + len(answer)
            first, last = encodings.char_to_token(row, start), encodings.char_to_token(row, end - 1)
            labels[row, first : last + 1] = ids[first : last + 1]
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def train_llm(tokenizer: PreTrainedTokenizerBase, seed: int, steps: int, progress: Progress) -> LlamaForCausalLM:
    """Pre-train the language model on fresh text every step."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = LlamaForCausalLM(llm_config(len(tokenizer)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_wsd_schedule(optimizer, min(100, steps // 10), steps // 4, num_training_steps=steps)
    task = progress.add_task("language model", total=steps)
    for step in range(steps):
        texts = [random_text(rng) for _ in range(LLM_BATCH)]
        loss = model(**encode_texts(texts, tokenizer), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            progress.update(task, completed=step, description=f"language model, loss {loss.item():.3f}")
    progress.update(task, completed=steps)
    return model.eval()


def clip_config(vocab_size: int) -> CLIPConfig:
    """Return the configuration of CLIP: the vision tower, which ships, and the text tower, used only for training."""
    return CLIPConfig(
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            "projection_dim": 128,
        },
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "projection_dim": 128,
            "eos_token_id": 2,
            "bos_token_id": 1,
            "pad_token_id": 0,
        },
        projection_dim=128,
    )


def near_misses(scene: Scene, rng: random.Random) -> list[Scene]:
    """Return the scene and three variants: one thing moved, one thing with another shape, and the colours rotated.

    Negatives that share most words in a batch make the contrastive loss distinguish which thing has which colour and
    shape at which place.
    """
    things = list(scene.things)
    index = rng.randrange(len(things))
    thing = things[index]
    place = rng.choice([place for place in range(len(PLACES)) if place not in {t.place for t in things}])
    shape = rng.choice([shape for shape in SHAPES if shape not in {t.shape for t in things}])
    moved, reshaped = things.copy(), things.copy()
    moved[index] = replace(thing, place=place)
    reshaped[index] = replace(thing, shape=shape)
    colours = [t.colour for t in things]
    turned = [replace(t, colour=c) for t, c in zip(things, colours[1:] + colours[:1], strict=True)]
    return [scene, *(Scene(tuple(sorted(items))) for items in (moved, reshaped, turned))]


def train_vision_tower(
    tokenizer: PreTrainedTokenizerBase, seed: int, steps: int, progress: Progress
) -> tuple[CLIPModel, CLIPImageProcessorPil]:
    """Pre-train CLIP on images and captions of the training split by its symmetric contrastive loss (CLIP, fig. 3)."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)
    groups = [near_misses(random_scene(rng, "train"), rng) for _ in range(CLIP_POOL)]
    groups = [[s for s in group if s.split == "train"] for group in groups]
    task = progress.add_task("drawing images", total=len(groups))
    pixels = []
    for group in groups:
        pixels.append(processor([draw(s, rng) for s in group], return_tensors="pt")["pixel_values"].half())
        progress.advance(task)
    model = CLIPModel(clip_config(len(tokenizer)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(200, steps // 10), steps)
    task = progress.add_task("vision tower", total=steps)
    for step in range(steps):
        chosen = rng.sample(range(len(groups)), CLIP_SCENES)
        captions = [f"{caption(s)}</s>" for index in chosen for s in groups[index]]
        text = tokenizer(captions, padding=True, return_tensors="pt", pad_to_multiple_of=8)
        images = torch.cat([pixels[index] for index in chosen]).float()
        output = model(input_ids=text["input_ids"], attention_mask=text["attention_mask"], pixel_values=images)
        target = torch.arange(len(captions))
        same = torch.tensor([[a == b for b in captions] for a in captions]) & ~torch.eye(
            len(captions), dtype=torch.bool
        )
        logits = output.logits_per_text.masked_fill(same, float("-inf"))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            progress.update(task, completed=step, description=f"vision tower, loss {loss.item():.3f}")
    progress.update(task, completed=steps)
    return model.eval(), processor


def build_demo(
    output: Path, seed: int = 0, llm_steps: int = LLM_STEPS, clip_steps: int = CLIP_STEPS
) -> dict[str, float]:
    """Pre-train tokenizer, vision tower and language model; write `output/llm` and `output/vision_tower` in bf16.

    Returns:
        Seconds spent on each part.
    """
    seconds: dict[str, float] = {}
    with Progress() as progress:
        start = time.monotonic()
        tokenizer = build_tokenizer(seed)
        tokenizer.pad_token = "<unk>"
        clip, processor = train_vision_tower(tokenizer, seed, clip_steps, progress)
        clip.vision_model.to(torch.bfloat16).save_pretrained(output / "vision_tower")
        processor.save_pretrained(output / "vision_tower")
        seconds["vision_tower"] = time.monotonic() - start
        start = time.monotonic()
        llm = train_llm(tokenizer, seed, llm_steps, progress)
        llm.to(torch.bfloat16).save_pretrained(output / "llm")
        tokenizer.pad_token = None
        tokenizer.save_pretrained(output / "llm")
        seconds["llm"] = time.monotonic() - start
    share(output)
    return seconds
