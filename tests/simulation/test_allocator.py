"""The replay of the caching allocator, on sequences whose result is known from its source."""

from __future__ import annotations

from tests.simulation.allocator import MIB, replay


def sizes(*steps: int) -> list[tuple[str, int, int]]:
    """Allocations of MiB, and frees: -1 frees the first allocation, -2 the second."""
    taken: list[int] = []
    events = []
    for step in steps:
        if step > 0:
            taken.append(step * MIB)
            events.append(("+", len(taken), step * MIB))
        else:
            events.append(("-", -step, taken[-step - 1]))
    return events


def reserved(*steps: int) -> tuple[float, float]:
    """MiB that are reserved without and with expandable segments."""
    events = sizes(*steps)
    return tuple(replay(events, expandable=expandable).reserved / MIB for expandable in (False, True))  # type: ignore


def test_segments_are_rounded() -> None:
    assert reserved(3) == (20, 20)  # kLargeBuffer, and a page of an expandable segment
    assert reserved(11) == (12, 20)  # to 2 MiB, and to pages
    assert reserved(1) == (2, 2)


def test_a_freed_block_is_used_again_and_split() -> None:
    assert reserved(100, -1, 60, 40) == (100, 100)


def test_a_larger_row_after_a_smaller_one_leaves_the_smaller_block_unused() -> None:
    assert reserved(100, -1, 120) == (220, 120)  # an expandable segment grows at its end


def test_neighbours_are_joined() -> None:
    assert reserved(40, 40, -1, -2, 80) == (160, 80)
    assert reserved(80, -1, 40, 40, -2, -3, 80) == (80, 80)


def test_a_block_in_use_parts_the_free_ones() -> None:
    assert reserved(100, -1, 40, 40, -2, 60) == (160, 140)  # 20 are free at the end of the segment, which grows by 40


def test_the_most_that_was_allocated_at_once() -> None:
    assert replay(sizes(10, 20, -1, 5), expandable=True).allocated == 30 * MIB


def test_what_a_full_card_needs() -> None:
    """Free pages and segments are not needed; a page or segment with one block in use is."""

    def needed(*steps: int) -> tuple[float, float]:
        events = sizes(*steps)
        return tuple(replay(events, expandable=expandable).needed / MIB for expandable in (False, True))  # type: ignore

    assert needed(3) == (20, 20)
    assert needed(100, -1, 120) == (120, 120)
    assert needed(100, -1, 30, -2, 200) == (200, 200)
    assert needed(100, -1, 30, 200) == (300, 240)  # 30 are in the first two pages, and 200 begin within the second
