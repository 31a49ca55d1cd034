"""Compare logits and greedy answers of a merged model with those of base + adapter, computed block by block."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import LlavaConfig

from lora_llava.inference.batches import Batches
from lora_llava.model.adapter_file import PEFT_PREFIX
from lora_llava.model.adapters import adapter_on
from lora_llava.model.loading import default_device
from lora_llava.model.nf4_round_trip import nf4_round_trip
from lora_llava.model.weights.names import canonical_name, stored_name
from lora_llava.model.weights.streaming import build_empty, stream_weights
from lora_llava.model.weights.tensor_files import LazyTensor, checkpoint_bytes, lazy_tensors
from lora_llava.publishing.adapter_tensors import Adapter
from lora_llava.publishing.merged_weights import is_quantized
from lora_llava.publishing.proof_prompts import ProofPrompt

CONTEXT_LOGITS = 8
"""Number of positions before the answer whose logits are also compared."""
SMALL_BYTES = 2**30
_OF_ADAPTER = (".lora_", ".modules_to_save.", ".trainable_tokens_delta.")
"""Parts of the names of an adapter's parameters in a PEFT model, besides the newline, whose name is the base's."""
_PROMPTS = "prompts", "verify on the CPU with CUDA_VISIBLE_DEVICES="
Progress = Callable[[str], None]


@dataclass
class Prompts:
    """Encoded prompts.

    Attributes:
        ids: Token ids of each prompt up to where the answer starts, image tokens expanded.
        pixels: Image of each prompt, float32 of shape (1, 3, height, width), or (tiles, 3, height, width) for a
            LLaVA-1.6, or None.
        pad_token_id: Token id for padding on the left.
        sizes: Height and width of each image for a LLaVA-1.6, int64 of shape (1, 2); else None.
    """

    ids: list[list[int]]
    pixels: list[torch.Tensor | None]
    pad_token_id: int
    sizes: list[torch.Tensor | None]

    def batch(self, rows: Sequence[int], answers: Sequence[list[int]] | None = None) -> dict[str, torch.Tensor]:
        """Return prompts as one left-padded batch, with answers appended if given."""
        texts = [self.ids[i] + (answers[i] if answers is not None else []) for i in rows]
        longest = max(map(len, texts))
        ids = torch.full((len(texts), longest), self.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, longest - len(text) :] = torch.tensor(text)
            mask[row, longest - len(text) :] = 1
        batch = {"input_ids": ids, "attention_mask": mask}
        for name, of in (("pixel_values", self.pixels), ("image_sizes", self.sizes)):
            found = [each for i in rows if (each := of[i]) is not None]
            if found:
                batch[name] = torch.cat(found)
        return {name: tensor.to(default_device()) for name, tensor in batch.items()}


def encode_samples(samples: Sequence[ProofPrompt], processor: Any) -> Prompts:
    """Encode prompts with the stock processor's chat template, as in training."""
    ids, pixels, sizes = [], [], []
    for sample in samples:
        encoded = processor.apply_chat_template(
            [sample.message()], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids.append(encoded["input_ids"][0].tolist())
        sizes.append(encoded.get("image_sizes"))
        found = encoded.get("pixel_values")
        pixels.append(found if found is None or sizes[-1] is None else found[0])  # one image's tiles have no padding
    return Prompts(ids, pixels, processor.tokenizer.pad_token_id, sizes)


def adapted_model(
    config: LlavaConfig,
    base: Sequence[LazyTensor],
    adapter: Adapter,
    dtype: torch.dtype,
    *,
    nf4_from: torch.dtype | None = None,
    keep: bool = False,
    progress: Progress = lambda block: None,
) -> PeftModel:
    """Build base + adapter with PEFT's layers; adapter and projector are in float32.

    Args:
        config: The base's config.
        base: The base's tensors.
        adapter: The adapter.
        dtype: The dtype of the base.
        nf4_from: Replace the weights of the language model's linear layers by their NF4 values, quantised from this
            dtype; None keeps them.
        keep: Keep weights in memory once read.
        progress: Called with the name of every block that runs.

    Returns:
        A model that reads its weights from disk as it runs.
    """
    tensors = {canonical_name(tensor.name): tensor for tensor in base}
    device = default_device()

    def load(name: str) -> torch.Tensor:
        name = name.removeprefix(PEFT_PREFIX)
        if name in adapter.saved or any(part in name for part in _OF_ADAPTER):
            return adapter.tensor(name).to(device)
        name = name.replace(".token_adapter.base_layer.", ".")
        name = stored_name(name.replace(".base_layer.", ".").replace(".original_module.", "."), tensors, config)
        weight = tensors[name].load()
        if nf4_from is not None and is_quantized(name, tuple(weight.shape)):
            weight = nf4_round_trip(weight, nf4_from)
        return weight.to(device, dtype)

    model = adapter_on(build_empty(config, device), adapter.config, dtype)
    stream_weights(model, load, keep=keep, progress=progress)
    return model.eval()


def merged_model(
    config: LlavaConfig,
    folder: Path,
    dtype: torch.dtype,
    *,
    keep: bool = False,
    progress: Progress = lambda block: None,
) -> Any:
    """Build a merged model that reads its weights from its folder as it runs; see `adapted_model`."""
    tensors = {canonical_name(tensor.name): tensor for tensor in lazy_tensors(folder)}
    model = build_empty(config, default_device())
    stream_weights(
        model,
        lambda name: tensors[stored_name(name, tensors, config)].load().to(default_device(), dtype),
        keep=keep,
        progress=progress,
    )
    return model.eval()


def stays_in_memory(tensors: Sequence[LazyTensor], dtype: torch.dtype) -> bool:
    """Check whether to keep a model's weights between passes: if they fit on the GPU, or on a CPU if they are small.

    Without a GPU, the system's page cache keeps large weights as long as there is room.
    """
    needed = checkpoint_bytes(tensors, dtype)
    if torch.cuda.is_available():
        return needed * 1.3 < torch.cuda.mem_get_info()[0]
    return needed < SMALL_BYTES


@torch.inference_mode()
def greedy_answers(model: Any, prompts: Prompts, max_new_tokens: int, stop_ids: Sequence[int]) -> list[list[int]]:
    """Answer all prompts greedily, in one batch if it fits into memory.

    Returns:
        Token ids of each answer, including the stop token.
    """

    def answer(rows: list[int]) -> list[list[int]]:
        batch = prompts.batch(rows)
        with warnings.catch_warnings():  # streamed weights are on the meta device until they are used
            warnings.filterwarnings("ignore", "You are calling .generate", UserWarning)
            output = model.generate(
                **batch,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=prompts.pad_token_id,
                eos_token_id=list(stop_ids),
                use_cache=True,
            )
        answers = []
        for row in output[:, batch["input_ids"].shape[1] :].tolist():
            end = next((i + 1 for i, token in enumerate(row) if token in stop_ids), len(row))
            answers.append(row[:end])
        return answers

    count = len(prompts.ids)
    return [each for _, found in Batches(count, *_PROMPTS).run(range(count), answer) for each in found]


@torch.inference_mode()
def last_logits(
    model: Any, prompts: Prompts, answers: Sequence[list[int]], batch_size: int, *, with_adapter: bool = True
) -> list[torch.Tensor]:
    """Compute logits over each prompt's last positions and its answer.

    Args:
        model: A model.
        prompts: The prompts.
        answers: Token ids to append to each prompt.
        batch_size: Most prompts per batch.
        with_adapter: False switches off the adapter of a PEFT model.

    Returns:
        One tensor per prompt, float32 on the CPU, of shape (context + answer length, vocabulary). The context is
        `CONTEXT_LOGITS` positions, or all of a shorter prompt.
    """
    keep = CONTEXT_LOGITS + max(map(len, answers))

    def compute(rows: list[int]) -> list[torch.Tensor]:
        with nullcontext() if with_adapter else model.disable_adapter():
            logits = model(**prompts.batch(rows, answers), use_cache=False, logits_to_keep=keep).logits
        lengths = [min(CONTEXT_LOGITS, len(prompts.ids[row])) + len(answers[row]) for row in rows]
        return [logits[i, -length:].float().cpu() for i, length in enumerate(lengths)]

    batches = Batches(batch_size, *_PROMPTS)
    return [each for _, found in batches.run(range(len(prompts.ids)), compute) for each in found]


@dataclass(frozen=True)
class Delta:
    """The difference between two models' logits.

    Attributes:
        max_logit_difference: Largest absolute difference.
        mean_logit_difference: Mean absolute difference.
        greedy_equal: Number of prompts with the same greedy answer, token by token.
        prompts: Number of prompts.
    """

    max_logit_difference: float
    mean_logit_difference: float
    greedy_equal: int
    prompts: int


def compare(reference: Sequence[torch.Tensor], other: Sequence[torch.Tensor], answers: Sequence[list[int]]) -> Delta:
    """Compare two models' logits over the reference's prompts and greedy answers.

    The greedy answers are equal if the other model, given each prefix of the reference's answer, also ranks its next
    token first.

    Args:
        reference: Logits of the reference, from `last_logits`.
        other: Logits of the other model, from `last_logits`.
        answers: Greedy answers of the reference.
    """
    gaps = [(a - b).abs() for a, b in zip(reference, other, strict=True)]
    equal = sum(
        logits[-len(answer) - 1 : -1].argmax(-1).tolist() == answer
        for logits, answer in zip(other, answers, strict=True)
    )
    count = sum(gap.numel() for gap in gaps)
    largest = torch.stack([gap.max() for gap in gaps]).max()  # Python's max would lose a NaN
    return Delta(float(largest), sum(float(gap.sum()) for gap in gaps) / count, equal, len(answers))
