"""Rows that share an image compute it once, with the losses and gradients of one sample at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_llava.data.collator import PackedCollator, PaddedCollator
from lora_llava.data.encode import IGNORE_INDEX
from lora_llava.data.images.image_sources import Pixels
from lora_llava.data.packed_rows.shared_prefixes import Prefix
from lora_llava.model.families.tower_families import image_processor_of
from lora_llava.model.fast_path.attention import use_flash_varlen
from lora_llava.model.fast_path.lean import make_lean
from lora_llava.model.fast_path.trained_loss import count_labels, labelled_loss
from lora_llava.recipe import Recipe
from tests.model.test_attention import Colours, adapted, gradients, sample

IMAGE, TOKENS = 896, 4


def question(group: int, image: str, length: int, trained: int, seed: int, before: int = 3) -> dict[str, Any]:
    """A sample whose first tokens and image are those of its group."""
    found = sample(length + before + TOKENS, trained, seed)
    own = torch.randint(3, 800, (before,), generator=torch.Generator().manual_seed(1000 + group)).tolist()
    ids = [*own, *[IMAGE] * TOKENS, *found["input_ids"][before + TOKENS :]]
    labels = [IGNORE_INDEX] * (len(ids) - trained) + ids[len(ids) - trained :]
    prefix = Prefix(group, before + TOKENS, 1, 1)
    return {"row_id": str(seed), "input_ids": ids, "labels": labels, "image_files": [image], "prefix": prefix}


def questions(group: int, image: str, count: int, seed: int) -> list[dict[str, Any]]:
    return [question(group, image, 4 + 3 * i % 7, 2 + i % 3, seed + i) for i in range(count)]


MIXED = [
    sample(17, 5, 2),
    *questions(0, "red", 3, 10),
    question(1, "blue", 9, 4, 20),  # alone here: its group is in other rows
    *questions(2, "green", 16, 30),
    sample(30, 9, 1, "red"),
]


@pytest.fixture
def model(stage2: Recipe) -> Any:
    peft_model = adapted(stage2)
    use_flash_varlen(peft_model.get_base_model())
    make_lean(peft_model.get_base_model().model.language_model)
    return peft_model


@pytest.fixture
def collators(model: Any) -> tuple[PaddedCollator, PackedCollator]:
    pixels = Pixels(Colours(), image_processor_of(Path("nowhere"), model.config))
    return PaddedCollator(pixels, 897), PackedCollator(pixels)


def one_at_a_time(model: Any, collator: PaddedCollator, samples: list[dict[str, Any]]) -> tuple[torch.Tensor, Any]:
    losses = [labelled_loss(model, collator([each]))[0] for each in samples]
    return torch.stack(losses).detach(), gradients(model, sum(losses))


def assert_equal_gradients(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error <= 1e-5, f"{name}: {error}"


@pytest.mark.parametrize(
    "samples",
    [MIXED, questions(0, "red", 2, 50), questions(0, "red", 1, 50) * 2, questions(3, "blue", 5, 1)[::-1]],
    ids=["mixed", "two", "the same row twice", "another order"],
)
def test_loss_and_every_gradient_equal_one_sample_at_a_time(model: Any, collators: Any, samples: Any) -> None:
    padded, packed = collators
    expected_loss, expected = one_at_a_time(model, padded, samples)
    batch = packed(samples)
    assert batch["input_ids"].shape[1] < sum(len(each["input_ids"]) for each in samples)
    loss, _ = labelled_loss(model, batch)
    torch.testing.assert_close(loss.detach(), expected_loss.sum(), rtol=1e-5, atol=0)
    assert_equal_gradients(gradients(model, loss), expected)


def captions(count: int) -> list[dict[str, Any]]:
    """Samples whose answer follows the image at once, as in Stage 1."""
    found = [question(0, "red", 5, 5, 70 + i, before=1) for i in range(count)]
    assert all(each["labels"][1 + TOKENS] != IGNORE_INDEX for each in found)
    return found


def test_an_answer_may_follow_the_image_at_once(model: Any, collators: Any) -> None:
    padded, packed = collators
    rows = [*captions(3), sample(9, 2, 4)]
    expected_loss, expected = one_at_a_time(model, padded, rows)
    batch = packed(rows)
    assert count_labels(batch) == 3 * 5 + 2
    loss, _ = labelled_loss(model, batch)
    torch.testing.assert_close(loss.detach(), expected_loss.sum(), rtol=1e-5, atol=0)
    assert_equal_gradients(gradients(model, loss), expected)


def test_a_shared_batch_is_exact(collators: Any) -> None:
    batch = collators[1]([sample(3, 1, 5), *captions(2), sample(2, 1, 6)])
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 8, 13, 18, 20]
    assert batch["cu_seq_lens_k"].tolist() == [0, 3, 8, 18, 28, 30]
    assert (batch["max_length_q"], batch["max_length_k"]) == (5, 10)
    assert batch["segment_lengths"] == [3, 5, 5, 5, 2]
    assert batch["key_segments"] == [0, 1, 1, 2, 1, 3, 4]
    positions = [*range(3), *range(5), *range(5, 10), *range(5, 10), *range(2)]
    assert batch["position_ids"].tolist() == [positions]
    assert batch["predictors"].tolist() == [[0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 7, 13, 14, 15, 16, 17, 18]]
    assert batch["pixel_values"].shape[0] == 1
    plain = collators[1]([each | {"prefix": None} for each in captions(2)])
    assert "key_segments" not in plain
    assert plain["pixel_values"].shape[0] == 2


def losses_of(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Return the loss of each trained token, in order."""
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten()
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE_INDEX)
    return losses[targets != IGNORE_INDEX]


@pytest.mark.parametrize("place", range(4))
def test_changing_a_branch_leaves_all_other_losses_bit_equal(model: Any, collators: Any, place: int) -> None:
    rows = [*questions(0, "red", 4, 10), sample(12, 3, 5)]
    counts = [sum(label != IGNORE_INDEX for label in row["labels"]) for row in rows]
    other = question(0, "red", len(rows[place]["input_ids"]) - 3 - TOKENS, counts[place], 99)
    changed = [*rows[:place], other, *rows[place + 1 :]]
    with torch.no_grad():
        before = losses_of(model, collators[1](rows)).split(counts)
        after = losses_of(model, collators[1](changed)).split(counts)
    assert [torch.equal(old, new) for old, new in zip(before, after, strict=True)] == [i != place for i in range(5)]


def test_changing_the_prefix_changes_all_branches_and_nothing_else(model: Any, collators: Any) -> None:
    rows = [*questions(0, "red", 4, 10), sample(12, 3, 5)]
    counts = [sum(label != IGNORE_INDEX for label in row["labels"]) for row in rows]
    changed = [each | {"image_files": ["green"]} for each in rows[:4]] + rows[4:]
    with torch.no_grad():
        before = losses_of(model, collators[1](rows)).split(counts)
        after = losses_of(model, collators[1](changed)).split(counts)
    same = [bool((old == new).any()) for old, new in zip(before, after, strict=True)]
    assert same == [False, False, False, False, True]


def test_the_leak_test_sees_a_mask_aligned_at_the_start(
    model: Any, collators: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SDPA's own causal mask lets a branch read the beginning of its prefix alone."""
    rows = questions(0, "red", 3, 10)
    expected = one_at_a_time(model, collators[0], rows)[0].sum()
    monkeypatch.setattr("lora_llava.model.fast_path.attention._band", lambda *args: None)
    with torch.no_grad():
        loss, _ = labelled_loss(model, collators[1](rows))
    assert abs(loss - expected) > 1e-4 * expected
