"""Mixtures: held-out rows share no image with training rows, and every source has its share of an epoch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaTokenizer

from lora_llava.core.errors import UserError
from lora_llava.data import Conversation, Template, Turn
from lora_llava.data.encoded import EncodedTable, encode_table
from lora_llava.data.formats import RowError
from lora_llava.data.images.image_sources import FolderImages, TableImages
from lora_llava.data.mixture import Share, epoch_counts, mixture
from lora_llava.data.sources import Source, list_source
from lora_llava.splits.hold_out import hold_back, row_keys

SHORT = Template(name="short", system="", system_format="", user_format="{}:", stop="</s>")
NAMES = ["data.validation_rows", "data.test_rows"]
KEYS = st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=3), min_size=1, max_size=25)


def table_of(tokenizer: LlamaTokenizer, *rows: tuple[str, list[str]]) -> EncodedTable:
    """Rows of a question and their images."""
    conversations = [
        Conversation(str(n), (Turn("user", "<image>" * len(images) + text), Turn("assistant", "x")), tuple(images))
        for n, (text, images) in enumerate(rows)
    ]
    source = list_source("rows", conversations, FolderImages(Path(), 1))
    return encode_table(source, tokenizer=tokenizer, template=SHORT)


def sides(keys: Sequence[Sequence[Any]]) -> list[Any]:
    """Which rows have to stay together: sets of rows, linked by keys in turn."""
    groups: list[tuple[set[Any], set[int]]] = []
    for row, mine in enumerate(keys):
        linked = [group for group in groups if group[0] & set(mine)]
        groups = [group for group in groups if group not in linked]
        merged = set(mine).union(*(names for names, _ in linked)), {row}.union(*(rows for _, rows in linked))
        groups.append(merged)
    return [next(rows for _, rows in groups if row in rows) for row in range(len(keys))]


@given(keys=KEYS, counts=st.lists(st.integers(0, 12), max_size=2), seed=st.integers(0, 99))
def test_held_out_rows_share_no_image_with_the_rest(keys: list[list[int]], counts: list[int], seed: int) -> None:
    together = sides(keys)
    try:
        parts = hold_back(keys, counts, seed, NAMES[: len(counts)])
    except UserError:
        assert sum(counts) > 0
        assert sum(counts) + max(map(len, together)) * len(counts) >= len(keys)  # nearly all were asked for
        return
    assert parts[0]
    assert sorted(row for part in parts for row in part) == list(range(len(keys)))
    assert all(part == sorted(part) for part in parts)
    for part in parts:
        assert set(part) == set().union(*(together[row] for row in part))
    for count, part in zip(counts, parts[1:], strict=True):
        largest = max((len(together[row]) for row in part), default=0)
        assert count <= len(part) < count + max(largest, 1)
    assert hold_back(keys, counts, seed, NAMES[: len(counts)]) == parts


def test_a_chain_of_shared_images_stays_together() -> None:
    chain = [[n, n + 1] for n in range(40)][::-1]
    keys = [*chain[::2], ["alone"], *chain[1::2]]
    for seed in range(20):
        try:
            left, held = hold_back(keys, [1], seed, NAMES[:1])
        except UserError:
            raise AssertionError("one row of its own is enough") from None
        assert sorted(map(len, (left, held))) == [1, 40]


def test_rows_with_separate_images_are_held_out_in_number() -> None:
    keys = [[f"{number}.png"] for number in range(100)]
    first, second = hold_back(keys, [30, 5], 0, NAMES), hold_back(keys, [30, 5], 1, NAMES)
    assert [len(part) for part in (*first, *second)] == [65, 30, 5, 65, 30, 5]
    assert first != second
    assert hold_back(keys, [0, 0], 0, NAMES) == [list(range(100)), [], []]
    assert hold_back(keys, [], 0, []) == [list(range(100))]
    assert hold_back(keys, [30, 0], 0, NAMES)[1] == first[1]  # another part changes nothing of the first


@pytest.mark.parametrize(
    ("keys", "counts", "message"),
    [
        (
            [[0], [1], [2]],
            [3, 0],
            "data.validation_rows is 3, but the data has only 3 rows in 3 groups by image",
        ),
        (
            [[0], [1], [2]],
            [2, 1],
            "data.validation_rows is 2, data.test_rows is 1, but the data has only 3 rows in 3 groups by image",
        ),
        (
            [[0], [0, 1], [1]],
            [0, 1],
            "data.test_rows is 1, but the data has only 3 rows in 1 groups by image",
        ),
        (
            [[0], [1]],
            [9, 9],
            "data.validation_rows is 9, data.test_rows is 9, but the data has only 2 rows in 2 groups by image",
        ),
    ],
)
def test_something_is_left_to_train_on(keys: list[list[int]], counts: list[int], message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}; leave some to train on$"):
        hold_back(keys, counts, 0, NAMES)


def test_a_row_is_known_by_its_images_or_its_text(letters: LlamaTokenizer, tmp_path: Path) -> None:
    images = FolderImages(tmp_path, 1)
    rows = [("a", ["x.png"]), ("b", ["./sub/../x.png", "y.png"]), ("c", []), ("d", []), ("c", [])]
    keys = row_keys(table_of(letters, *rows), images, 0)
    x, y = f"{images.root}/x.png", f"{images.root}/y.png"
    assert keys[:2] == [[x], [x, y]]
    assert [len(mine) for mine in keys[2:]] == [1, 1, 1]
    assert keys[2] == keys[4] != keys[3]


def test_an_image_is_the_same_in_every_source_that_has_its_file(letters: LlamaTokenizer, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    above, below = FolderImages(tmp_path, 1), FolderImages(tmp_path / "sub", 1)
    first = row_keys(table_of(letters, ("a", ["sub/x.png"]), ("same", [])), above, 0)
    second = row_keys(table_of(letters, ("b", ["x.png"]), ("same", [])), below, 1)
    third = row_keys(table_of(letters, ("b", ["x.png"])), above, 2)
    assert first == second
    assert third[0] != first[0]


def test_images_in_tables_are_distinguished_by_source(letters: LlamaTokenizer) -> None:
    table = table_of(letters, ("a", ["0"]), ("b", ["1:0", "1:1"]))
    first, second = (row_keys(table, TableImages([], 1), source) for source in (0, 1))
    assert len({*first[0], *first[1], *second[0], *second[1]}) == 6


COCO = [
    "000000442786.jpg",
    "COCO_train2014_000000442786.jpg",
    "COCO_val2014_000000442786.jpg",
    "train2017/000000442786.jpg",
    "coco/val2017/000000442786.jpg",
    "coco/train2014/COCO_train2014_000000442786.jpg",
]


def test_coco_s_images_are_the_same_in_every_release_and_source(letters: LlamaTokenizer, tmp_path: Path) -> None:
    rows = [("a", [name]) for name in COCO]
    found = row_keys(table_of(letters, *rows), FolderImages(tmp_path, 1), 0)
    (tmp_path / "other").mkdir()
    found += row_keys(table_of(letters, *rows), FolderImages(tmp_path / "other", 1), 1)
    assert found == [[("coco", "000000442786.jpg")]] * 12
    others = ["000000442787.jpg", "00000442786.jpg", "000000442786.png", "x000000442786.jpg", "train/442786.jpg"]
    keys = row_keys(table_of(letters, *(("a", [name]) for name in others)), FolderImages(tmp_path, 1), 0)
    assert len({*map(tuple, keys), *map(tuple, found)}) == 6


def test_rows_that_could_not_be_read_are_not_one_image(letters: LlamaTokenizer, tmp_path: Path) -> None:
    source = Source("rows", FolderImages(tmp_path, 1), "f", lambda: (RowError("role order", "x") for _ in range(50)))
    keys = row_keys(encode_table(source, tokenizer=letters, template=SHORT), source.images, 0)
    keys += [[f"{number}.png"] for number in range(50)]
    for seed in range(5):
        assert len(hold_back(keys, [10], seed, NAMES[:1])[1]) == 10


@given(
    available=st.lists(st.integers(1, 50), min_size=1, max_size=5),
    total=st.none() | st.integers(300, 400),
    data=st.data(),
)
def test_an_epoch_has_of_every_source_what_was_asked(
    available: list[int], total: int | None, data: st.DataObject
) -> None:
    asked = st.just({}) | st.fixed_dictionaries({"weight": st.floats(0.1, 9)})
    asked |= st.fixed_dictionaries({"rows": st.integers(1, 50)})
    shares = [Share(str(n), **data.draw(asked)) for n in range(len(available))]
    counts = epoch_counts(shares, available, total)
    weighted = [n for n, share in enumerate(shares) if share.weight is not None]
    for n, (share, count) in enumerate(zip(shares, counts, strict=True)):
        if n not in weighted:
            assert count == (share.rows or available[n])
    if not weighted:
        return
    if total is None:
        assert sum(counts[n] for n in weighted) == sum(available[n] for n in weighted)
    else:
        assert sum(counts) == total
    pool, weights = sum(counts[n] for n in weighted), sum(shares[n].weight or 0 for n in weighted)
    for n in weighted:
        assert abs(counts[n] - pool * (shares[n].weight or 0) / weights) <= 1


@pytest.mark.parametrize(
    ("shares", "total", "counts"),
    [
        ([Share("a"), Share("b")], None, [10, 30]),
        ([Share("a", rows=3), Share("b")], None, [3, 30]),
        ([Share("a", rows=25), Share("b", rows=0)], None, [25, 0]),
        ([Share("a", weight=1), Share("b", weight=1)], None, [20, 20]),
        ([Share("a", weight=3), Share("b", weight=1)], 100, [75, 25]),
        ([Share("a", weight=5), Share("b", rows=6)], 20, [14, 6]),
        ([Share("a"), Share("b", weight=0.1)], 20, [10, 10]),
    ],
)
def test_shares_in_numbers(shares: list[Share], total: int | None, counts: list[int]) -> None:
    assert epoch_counts(shares, [10, 30], total) == counts


@pytest.mark.parametrize("total", [5, 10])
def test_something_is_left_for_sources_with_a_weight(total: int) -> None:
    message = (
        f"data.max_train_rows is {total}, and sources without a weight already have 10 rows; raise it, or "
        "set fewer rows for those sources"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        epoch_counts([Share("a"), Share("b", weight=1)], [10, 30], total)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 25)), min_size=1, max_size=4),
    epochs=st.integers(1, 6),
    seed=st.integers(0, 9),
)
def test_over_the_epochs_every_sample_comes_as_often_as_any_other(
    sizes: list[tuple[int, int]], epochs: int, seed: int
) -> None:
    members, start = [], 0
    for size, _ in sizes:
        members.append(list(range(start, start + size)))
        start += size
    counts = [count for _, count in sizes]
    draw = mixture(members, counts, seed)
    seen: Counter[int] = Counter()
    for epoch in range(epochs):
        drawn = draw(epoch)
        assert draw(epoch) == mixture(members, counts, seed)(epoch) == drawn
        assert [sum(sample in mine for sample in drawn) for mine in members] == counts
        seen.update(drawn)
        for mine in members:
            times = [seen[sample] for sample in mine]
            assert max(times) - min(times) <= 1


def test_epochs_differ_and_so_do_seeds_and_sources() -> None:
    members = [list(range(100)), list(range(100, 200))]
    draw = mixture(members, [100, 100], 0)
    first, second, other = draw(0), draw(1), mixture(members, [100, 100], 1)(0)
    assert first != second
    assert first != other
    assert [sample - 100 for sample in first[100:]] != first[:100]
    assert sorted(first) == sorted(second) == sorted(other) == list(range(200))


def test_a_source_without_rows_gives_none() -> None:
    assert mixture([[], [7]], [3, 2], 0)(0) == [7, 7]
