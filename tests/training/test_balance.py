"""Rows distributed to ranks: every sample once, the same steps as one rank, and about as many tokens for each."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lora_llava.data.packed_rows.packing import pack_samples
from lora_llava.distributed.balance import distribute_rows, rank_tokens
from lora_llava.planning.row_order import batch_samples

BUDGET = 100


@st.composite
def layouts(draw: Any) -> dict[str, Any]:
    lengths = draw(st.lists(st.integers(1, BUDGET), min_size=1, max_size=60))
    packed = draw(st.booleans())
    size = draw(st.integers(1, 5))
    rows = pack_samples(lengths, BUDGET) if packed else batch_samples(lengths, size)
    return {
        "rows": rows,
        "lengths": lengths,
        "ranks": draw(st.integers(2, 5)),
        "accumulation": draw(st.integers(1, 3)),
        "max_tokens": BUDGET if packed else None,
        "padded": False if packed else draw(st.booleans()),
    }


def steps_of(rows: list[list[int]], layout: dict[str, Any]) -> list[list[list[int]]]:
    size = layout["ranks"] * layout["accumulation"]
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@given(layouts())
def test_every_step_keeps_its_samples_each_once(layout: dict[str, Any]) -> None:
    before, after = steps_of(layout["rows"], layout), steps_of(distribute_rows(**layout), layout)
    flat = [[sorted(i for row in step for i in row) for step in steps] for steps in (before, after)]
    assert flat[0] == flat[1]


@given(layouts())
def test_ranks_run_equally_many_passes_and_only_the_last_step_has_empty_rows(layout: dict[str, Any]) -> None:
    steps = steps_of(distribute_rows(**layout), layout)
    assert [len(step) for step in steps[:-1]] == [layout["ranks"] * layout["accumulation"]] * (len(steps) - 1)
    assert len(steps[-1]) % layout["ranks"] == 0
    assert all(row for step in steps[:-1] for row in step)
    samples, empty = sum(map(len, steps[-1])), sum(not row for row in steps[-1])
    if samples >= len(steps[-1]) and layout["max_tokens"] is not None:
        assert empty == 0


@given(layouts())
def test_no_row_exceeds_its_budget_or_batch_size(layout: dict[str, Any]) -> None:
    for row in distribute_rows(**layout):
        if layout["max_tokens"] is not None:
            assert sum(layout["lengths"][i] for i in row) <= BUDGET
        else:
            assert len(row) <= max(map(len, layout["rows"]))


@given(layouts())
@example(
    {
        "rows": [[4, 1], [6], [3, 2], [5], [7], [0]],
        "lengths": [16, 23, 39, 46, 62, 86, 86, 86],
        "ranks": 5,
        "accumulation": 2,
        "max_tokens": BUDGET,
        "padded": False,
    }
)
def test_the_heaviest_rank_of_a_step_never_gets_heavier(layout: dict[str, Any]) -> None:
    """Except in a last step, if fewer rows are empty then."""
    ranks, lengths = layout["ranks"], layout["lengths"]
    before, after = steps_of(layout["rows"], layout), steps_of(distribute_rows(**layout), layout)
    for old, new in zip(before, after, strict=True):
        lacking = len(new) - len(old) + old.count([])
        heaviest = max(rank_tokens(new, lengths, ranks)), max(rank_tokens(old, lengths, ranks))
        assert new.count([]) <= lacking
        assert heaviest[0] <= heaviest[1] or new.count([]) < lacking
        assert heaviest[0] <= heaviest[1] or old is before[-1]


@given(layouts())
def test_distribution_is_deterministic(layout: dict[str, Any]) -> None:
    assert distribute_rows(**layout) == distribute_rows(**layout)


@given(layouts())
def test_one_rank_keeps_its_rows(layout: dict[str, Any]) -> None:
    assert distribute_rows(**layout | {"ranks": 1}) == layout["rows"]


def test_uneven_rows_are_repacked() -> None:
    lengths = [50, 30, 20, 60]
    assert distribute_rows([[0, 1, 2], [3]], lengths, ranks=2, max_tokens=100) == [[3, 2], [0, 1]]


def test_full_rows_stay_within_their_budget() -> None:
    lengths = [5, 5, 4, 3, 3] * 2
    balanced = distribute_rows([[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]], lengths, ranks=2, accumulation=2, max_tokens=10)
    assert [sum(lengths[i] for i in row) for row in balanced] == [10] * 4


def test_a_full_batch_does_not_grow() -> None:
    assert [len(row) for row in distribute_rows([[0, 1], [2, 3]], [9, 2, 3, 3], ranks=2)] == [2, 2]


def test_even_rows_are_kept() -> None:
    balanced = distribute_rows([[0, 1], [2, 3, 4]], [5, 5, 4, 3, 3], ranks=2, padded=True)
    assert rank_tokens(balanced, [5, 5, 4, 3, 3], 2) == [10, 10]


def test_a_step_with_fewer_samples_than_ranks_leaves_some_empty() -> None:
    assert distribute_rows([[0, 1]], [5, 5], ranks=3, max_tokens=10) == [[0], [1], []]


def test_padded_batches_of_a_rank_have_similar_lengths() -> None:
    lengths = [10, 1, 9, 2, 10, 1, 9, 2]
    balanced = distribute_rows([[0, 1], [2, 3], [4, 5], [6, 7]], lengths, ranks=2, accumulation=2, padded=True)
    assert rank_tokens(balanced, lengths, 2) == [22, 22]
    assert [[lengths[i] for i in row] for row in balanced] == [[10, 9], [10, 9], [2, 1], [2, 1]]


@pytest.mark.parametrize("budget", [2048, 4096])
def test_scienceqa_like_rows_are_even_within_three_percent(budget: int) -> None:
    drawn = random.Random(0)
    lengths = [int(drawn.lognormvariate(5.5, 0.6)) % 900 + 30 + 576 * (drawn.random() < 0.49) for _ in range(2000)]
    rows = pack_samples(lengths, budget)
    balanced = distribute_rows(rows, lengths, ranks=8, max_tokens=budget)
    steps = [balanced[start : start + 8] for start in range(0, len(balanced) - 8, 8)]
    shares = [rank_tokens(step, lengths, 8) for step in steps]
    assert max(max(share) / (sum(share) / 8) for share in shares) <= 1.03
