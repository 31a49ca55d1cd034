"""The order of rows that share images."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_llava.data.packed_rows.shared_prefixes import Prefix, SharedPrefixes
from lora_llava.planning.row_order import RowOrder, order_rows, validation_rows
from lora_llava.recipe import TrainingSection

PREFIX = 60


def section(**values: Any) -> TrainingSection:
    return TrainingSection(learning_rate=1e-3, **values)


def drawn(sizes: list[int]) -> tuple[list[int], SharedPrefixes]:
    """Rows of groups of these sizes, interleaved; a group of one shares nothing."""
    rows = [group for place in range(max(sizes)) for group, size in enumerate(sizes) if place < size]
    lengths = [PREFIX + 5 + (7 * i) % 20 for i in range(len(rows))]
    return lengths, SharedPrefixes([Prefix(group, PREFIX, 1, 1) if sizes[group] > 1 else None for group in rows])


def per_step(order: RowOrder, shared: SharedPrefixes, ranks: int = 1) -> list[Counter[Any]]:
    size = order.accumulation * ranks
    groups = [
        [shared.group(i) for row in order.rows[at : at + size] for i in row] for at in range(0, len(order.rows), size)
    ]
    return [Counter(group for group in step if group is not None) for step in groups]


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    settings=st.sampled_from(
        [{"max_tokens_per_row": 90}, {"max_tokens_per_row": 300}, {"batch_size": 1}, {"batch_size": 6}]
    ),
    accumulation=st.integers(1, 4),
    epochs=st.sampled_from([0.5, 1.0, 2.0]),
    questions=st.integers(1, 10),
    ranks=st.integers(1, 2),
)
def test_every_row_is_in_every_epoch_once(
    sizes: list[int], settings: dict[str, int], accumulation: int, epochs: float, questions: int, ranks: int
) -> None:
    lengths, shared = drawn(sizes)
    training = section(**settings, gradient_accumulation=accumulation, epochs=epochs, questions_per_image=questions)
    order, again = (order_rows(training, lengths, seed=1, padded=False, ranks=ranks, shared=shared) for _ in range(2))
    assert order == again
    seen = Counter(i for row in order.rows for i in row)
    if epochs >= 1:
        assert seen == Counter(dict.fromkeys(range(len(lengths)), int(epochs)))
    assert max(seen.values()) <= max(1, epochs)
    assert order.accumulation <= accumulation
    if budget := settings.get("max_tokens_per_row"):
        assert max(shared.tokens(row, lengths) for row in order.rows) == order.longest_row <= budget
    elif ranks == 1:
        assert max(map(len, order.rows)) <= settings["batch_size"]


def test_rows_without_twins_keep_the_order_that_they_had() -> None:
    lengths, shared = drawn([1] * 40)
    for settings in ({"max_tokens_per_row": 300}, {"batch_size": 4}):
        training = section(**settings, gradient_accumulation=2, epochs=2)
        plain = order_rows(training, lengths, seed=3, padded=False)
        assert order_rows(training, lengths, seed=3, padded=False, shared=shared) == plain
        assert plain.shared is None


def test_padded_rows_share_nothing() -> None:
    lengths, shared = drawn([4] * 10)
    training = section(batch_size=4)
    assert order_rows(training, lengths, seed=3, padded=True, shared=shared) == order_rows(
        training, lengths, seed=3, padded=True
    )


def test_a_step_keeps_its_samples_and_has_fewer_rows() -> None:
    """Rows of 600 tokens have 8 samples, or a group of 10 twice: 8 rows of 4 groups' worth become fewer."""
    lengths, shared = drawn([10] * 60)
    training = section(max_tokens_per_row=600, gradient_accumulation=8)
    plain, order = (order_rows(training, lengths, seed=0, padded=False, shared=each) for each in (None, shared))
    assert (plain.accumulation, order.accumulation) == (8, 3)
    assert abs(order.samples_per_step / plain.samples_per_step - 1) < 0.1
    assert sum(shared.tokens(row, lengths) for row in order.rows) < 0.35 * sum(lengths)


@pytest.mark.parametrize("settings", [{"max_tokens_per_row": 300, "gradient_accumulation": 3}, {"batch_size": 6}])
def test_a_step_has_at_most_the_questions_of_an_image_that_the_recipe_allows(settings: dict[str, int]) -> None:
    lengths, shared = drawn([9, 7, 12, 1, 2, 1, 1] * 12)
    training = section(**settings, questions_per_image=3, epochs=2)
    order = order_rows(training, lengths, seed=5, padded=False, shared=shared)
    assert max(max(step.values(), default=0) for step in per_step(order, shared)) == 3


def test_batches_keep_their_number_of_samples_and_share_all_they_can() -> None:
    lengths, shared = drawn([8] * 20)
    order = order_rows(section(batch_size=16), lengths, seed=0, padded=False, shared=shared)
    assert list(map(len, order.rows)) == [16] * 10
    assert all(sorted(map(len, shared.runs(row))) == [8, 8] for row in order.rows)


def test_two_ranks_keep_the_rows_of_an_image_together() -> None:
    lengths, shared = drawn([5] * 24)
    training = section(max_tokens_per_row=300, gradient_accumulation=2)
    one, two = (order_rows(training, lengths, seed=0, padded=False, shared=shared, ranks=ranks) for ranks in (1, 2))
    assert sum(shared.tokens(row, lengths) for row in two.rows) <= sum(shared.tokens(row, lengths) for row in one.rows)
    assert two.longest_row <= 300


def test_a_validation_has_every_row_once_and_shares() -> None:
    lengths, shared = drawn([5, 1, 3] * 6)
    for settings in ({"max_tokens_per_row": 300}, {"batch_size": 4}):
        rows = validation_rows(section(**settings), lengths, shared=shared)
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        assert sum(shared.tokens(row, lengths) for row in rows) < sum(lengths)
        assert validation_rows(section(**settings), lengths, shared=shared, padded=True) == validation_rows(
            section(**settings), lengths, padded=True
        )
