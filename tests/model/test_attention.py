"""Packed rows have the loss and gradients of padded ones, and no sample attends to another."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from lora_llava.data.collator import PackedCollator, PaddedCollator
from lora_llava.data.encode import IGNORE_INDEX
from lora_llava.data.images.image_sources import Pixels
from lora_llava.model.adapters import add_adapters, lora_config
from lora_llava.model.families.tower_families import image_processor_of
from lora_llava.model.fast_path.attention import flash_varlen_attention, use_flash_varlen
from lora_llava.model.loading import load_base
from lora_llava.model.start import prepare_base
from lora_llava.recipe import Recipe
from lora_llava.recipe.schema import LINEARS


class Colours:
    def open(self, name: str) -> Image.Image:
        return Image.new("RGB", (40, 32), name)

    def read(self, name: str) -> bytes:
        return name.encode()


def sample(length: int, trained: int, seed: int, image: str | None = None) -> dict[str, Any]:
    ids = torch.randint(3, 800, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    if image:
        ids[2:6] = [896] * 4
    labels = [IGNORE_INDEX] * (length - trained) + ids[length - trained :]
    return {"row_id": str(seed), "input_ids": ids, "labels": labels, "image_files": [image] if image else []}


SAMPLES = [sample(30, 9, 1, "red"), sample(17, 5, 2), sample(41, 20, 3, "blue"), sample(9, 2, 4)]


def adapted(stage2: Recipe) -> Any:
    """Return a small model in float32 with adapters far from zero."""
    base = prepare_base(stage2.model, 0)
    peft_model = add_adapters(load_base(base.folder, dtype="float32"), lora_config(r=4, alpha=8, targets=LINEARS))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return peft_model


@pytest.fixture
def model(stage2: Recipe) -> Any:
    return adapted(stage2)


@pytest.fixture
def collators(model: Any) -> tuple[PaddedCollator, PackedCollator]:
    pixels = Pixels(Colours(), image_processor_of(Path("nowhere"), model.config))
    return PaddedCollator(pixels, 897), PackedCollator(pixels)


def token_losses(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Losses of the trained tokens, in order."""
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none", ignore_index=IGNORE_INDEX)
    return losses[labels[:, 1:].flatten() != IGNORE_INDEX]


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_loss_and_every_gradient_equal_the_padded_reference(model: Any, collators: Any) -> None:
    padded, packed = collators
    reference = token_losses(model, padded(SAMPLES))
    expected = gradients(model, reference.mean())
    use_flash_varlen(model.get_base_model())
    losses = token_losses(model, packed(SAMPLES))
    torch.testing.assert_close(losses, reference, rtol=1e-5, atol=1e-6)
    found = gradients(model, losses.mean())
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error <= 1e-5, f"{name}: {error}"


def test_changing_one_sample_leaves_all_other_losses_bit_equal(model: Any, collators: Any) -> None:
    packed = collators[1]
    use_flash_varlen(model.get_base_model())
    with torch.no_grad():
        before = token_losses(model, packed(SAMPLES))
        for place in range(len(SAMPLES)):
            changed = list(SAMPLES)
            image = next(iter(SAMPLES[place]["image_files"]), None) and "green"
            changed[place] = sample(len(SAMPLES[place]["input_ids"]), 2, 99, image)
            after = token_losses(model, packed(changed))
            split = [sum(label != IGNORE_INDEX for label in row["labels"]) for row in SAMPLES]
            own = [2 if i == place else count for i, count in enumerate(split)]
            for i, (old, new) in enumerate(zip(before.split(split), after.split(own), strict=True)):
                if i != place:
                    assert torch.equal(old, new), f"sample {i} saw sample {place}"


def test_the_leak_test_sees_a_leak(model: Any, collators: Any) -> None:
    """Without sample bounds a row is one long sample, whose end attends to its start."""
    batch = collators[1](SAMPLES)
    use_flash_varlen(model.get_base_model())
    with torch.no_grad():
        apart = token_losses(model, dict(batch))
        end = torch.tensor([0, batch["input_ids"].shape[1]], dtype=torch.int32)
        together = token_losses(model, batch | {"cu_seq_lens_q": end, "cu_seq_lens_k": end})
    torch.testing.assert_close(apart[:9], together[:9], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(apart[9:], together[9:], atol=1e-3)


def test_a_padded_batch_and_generation_are_unchanged(model: Any, collators: Any) -> None:
    batch = collators[0](SAMPLES)
    del batch["labels"]
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits
        answer = model.generate(**batch, max_new_tokens=5, do_sample=False, pad_token_id=897)
        use_flash_varlen(model.get_base_model())
        assert torch.equal(model(**batch, use_cache=False).logits, expected)
        assert torch.equal(model.generate(**batch, max_new_tokens=5, do_sample=False, pad_token_id=897), answer)
    assert model.config.vision_config._attn_implementation == "sdpa"


def test_a_packed_row_without_bounds_still_keeps_samples_apart(model: Any, collators: Any) -> None:
    """Without bounds transformers finds samples by their positions; our mask must not undo that."""
    use_flash_varlen(model.get_base_model())
    batch = collators[1](SAMPLES)
    with torch.no_grad():
        expected = token_losses(model, dict(batch))
        for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
            del batch[name]
        torch.testing.assert_close(token_losses(model, batch), expected, rtol=1e-5, atol=1e-6)


def test_the_leak_test_sees_the_cache_trap(model: Any, collators: Any) -> None:
    """With a cache transformers does not separate the samples of a row; our bounds do."""
    use_flash_varlen(model.get_base_model())
    batch = collators[1](SAMPLES)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "pixel_values")}
    with torch.no_grad():
        apart = model(**batch | {"labels": None}, use_cache=False).logits
        assert not torch.allclose(model(**inputs, use_cache=True).logits[:, 30:], apart[:, 30:], atol=1e-3)
        kept = {name: value for name, value in batch.items() if name != "labels"}
        torch.testing.assert_close(model(**kept, use_cache=True).logits, apart, rtol=1e-5, atol=1e-5)


def test_a_packed_batch_is_exact(collators: Any) -> None:
    batch = collators[1]([sample(3, 1, 5), sample(2, 1, 6)])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert (batch["max_length_q"], batch["max_length_k"]) == (3, 3)
    assert batch["labels"].tolist()[0][:2] == [IGNORE_INDEX] * 2
    assert "attention_mask" not in batch
    assert "pixel_values" not in batch
    with pytest.raises(ValueError, match="the first token of sample 7 is trained"):
        collators[1]([sample(3, 3, 7)])


def test_the_backward_pass_takes_each_segment_once() -> None:
    """The gradient of a slice fills a tensor of the whole row, once per sample: rows of many samples become slow."""
    rows = [torch.randn(1, 2, 12, 8, requires_grad=True) for _ in range(3)]
    ends = torch.tensor([0, 5, 9, 12], dtype=torch.int32)
    output, _ = flash_varlen_attention(torch.nn.Identity(), *rows, None, cu_seq_lens_q=ends)
    steps, found = [output.grad_fn], []
    while steps:
        step = steps.pop()
        if step is not None and step not in found:
            found.append(step)
            steps.extend(parent for parent, _ in step.next_functions)
    names = Counter(type(step).__name__ for step in found)
    assert names["SplitWithSizesBackward0"] == 3, names
    assert names["SliceBackward0"] == 0, names


def test_values_that_are_a_slice_do_not_keep_the_whole() -> None:
    """Phi-3's queries, keys and values are slices of one matrix; rotary positions copy the first two."""
    query, key = (torch.randn(1, 2, 16, 8, requires_grad=True) for _ in range(2))
    whole = torch.randn(1, 16, 3 * 16, requires_grad=True)
    value = whole[..., 32:].view(1, 16, 2, 8).transpose(1, 2)
    ends, kept = torch.tensor([0, 16], dtype=torch.int32), []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output, _ = flash_varlen_attention(
            torch.nn.Module(), query, key, value, None, cu_seq_lens_q=ends, max_length_q=16
        )
    assert max(kept) == query.nbytes
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
    assert torch.equal(output, expected)
    output.sum().backward()
    assert whole.grad is not None
    assert int(whole.grad.count_nonzero()) == value.numel()
