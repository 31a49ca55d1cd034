"""What CUDA's caching allocator holds for a sequence of allocations, with and without expandable segments.

After c10/cuda/CUDACachingAllocator.cpp: small and large blocks have their own pools, the best fit is split, and freed
neighbours are joined. Only when the card is full, memory goes back to the driver: segments without a block in use, or
pages of expandable segments. The replay does not do so, but counts what would be left.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

MIB = 2**20
SMALL = MIB
"""Largest block of the pool of small ones (kSmallSize)."""


@dataclass
class _Block:
    size: int
    used: bool
    before: int | None
    after: int | None


@dataclass
class _Pool:
    """The blocks of one pool.

    Attributes:
        small: Whether it has the small blocks.
        expandable: Whether its one segment grows; otherwise each segment is as it was made.
        reserved: Bytes from the driver.
        occupied: Those of them in pages, or in fixed segments, with a block in use.
    """

    small: bool
    expandable: bool
    reserved: int = 0
    blocks: dict[int, _Block] = field(default_factory=dict)
    free: list[tuple[int, int]] = field(default_factory=list)  # sizes and addresses, sorted
    end: int = 0
    last: int | None = None  # address of the last block of an expandable segment
    segments: list[int] = field(default_factory=list)  # where fixed segments begin
    sizes: dict[int, int] = field(default_factory=dict)  # of fixed segments
    in_use: Counter[int] = field(default_factory=Counter)  # blocks by page, or by fixed segment
    occupied: int = 0

    def take(self, size: int) -> int:
        """Return the address of a block of so many bytes."""
        index = bisect.bisect_left(self.free, (size, -1))
        if index < len(self.free):
            _, address = self.free.pop(index)
        else:
            address = self._grow(size) if self.expandable else self._new_segment(size)
        self._split(address, size)
        self.blocks[address].used = True
        self._occupy(address, 1)
        return address

    def release(self, address: int) -> None:
        """Free a block and join it with free neighbours."""
        self.blocks[address].used = False
        self._occupy(address, -1)
        before, after = self.blocks[address].before, self.blocks[address].after
        if after is not None and not self.blocks[after].used:
            self._join(address, after)
        if before is not None and not self.blocks[before].used:
            self._forget_free(before)
            self._join(before, address, listed=False)
            address = before
        bisect.insort(self.free, (self.blocks[address].size, address))

    def _occupy(self, address: int, change: int) -> None:
        """Count a block more, or less, in its pages or in its segment."""
        if self.expandable:
            first, last = address // self._page, (address + self.blocks[address].size - 1) // self._page
            places = dict.fromkeys(range(first, last + 1), self._page)
        else:
            start = self.segments[bisect.bisect_right(self.segments, address) - 1]
            places = {start: self.sizes[start]}
        for place, size in places.items():
            before = self.in_use[place]
            self.in_use[place] += change
            self.occupied += size * (bool(before + change) - bool(before))

    @property
    def _page(self) -> int:
        return 2 * MIB if self.small else 20 * MIB

    def _new_segment(self, size: int) -> int:
        """kSmallBuffer, kLargeBuffer and kRoundLarge."""
        step = 2 * MIB
        made = step if self.small else 20 * MIB if size < 10 * MIB else -(-size // step) * step
        address, self.end = self.end, self.end + made + (1 << 40)  # segments are not neighbours
        self.blocks[address] = _Block(made, False, None, None)
        self.segments.append(address)
        self.sizes[address] = made
        self.reserved += made
        return address

    def _grow(self, size: int) -> int:
        """Map more pages behind the last block, which is used too if it is free."""
        last = self.last if self.last is not None and not self.blocks[self.last].used else None
        have = self.blocks[last].size if last is not None else 0
        grown = -(-(size - have) // self._page) * self._page
        self.reserved += grown
        if last is not None:
            self._forget_free(last)
            self.blocks[last].size += grown
            self.end += grown
            return last
        address, self.end = self.end, self.end + grown
        self.blocks[address] = _Block(grown, False, self.last, None)
        if self.last is not None:
            self.blocks[self.last].after = address
        self.last = address
        return address

    def _split(self, address: int, size: int) -> None:
        block = self.blocks[address]
        rest = block.size - size
        if not (rest >= 512 if self.small else rest > MIB):  # should_split
            return
        new, after = address + size, block.after
        self.blocks[new] = _Block(rest, False, address, after)
        if after is not None:
            self.blocks[after].before = new
        elif self.expandable:
            self.last = new
        block.size, block.after = size, new
        bisect.insort(self.free, (rest, new))

    def _join(self, address: int, after: int, *, listed: bool = True) -> None:
        """Make one block of two neighbours; `listed` if the second is in the list of free ones."""
        if listed:
            self._forget_free(after)
        gone = self.blocks.pop(after)
        self.blocks[address].size += gone.size
        self.blocks[address].after = gone.after
        if gone.after is not None:
            self.blocks[gone.after].before = address
        elif self.expandable:
            self.last = address

    def _forget_free(self, address: int) -> None:
        del self.free[bisect.bisect_left(self.free, (self.blocks[address].size, address))]


@dataclass(frozen=True)
class Replay:
    """Bytes of a replay.

    Attributes:
        allocated: Most bytes that were allocated at once.
        reserved: Bytes that the allocator took from the driver.
        needed: Most bytes of pages, or of fixed segments, with a block in use at once; a full card is left with these.
    """

    allocated: int
    reserved: int
    needed: int


def replay(events: Iterable[tuple[str, int, int]], *, expandable: bool) -> Replay:
    """Run a sequence of allocations.

    Args:
        events: From a meter: + or -, a key, and bytes.
        expandable: Whether `expandable_segments:True` is set.
    """
    pools = {small: _Pool(small, expandable) for small in (True, False)}
    live: dict[int, tuple[bool, int, int]] = {}
    total = peak = needed = 0
    for kind, key, size in events:
        if kind == "+":
            small = size <= SMALL
            live[key] = small, pools[small].take(size), size
            total += size
            peak = max(peak, total)
            needed = max(needed, sum(pool.occupied for pool in pools.values()))
        elif key in live:
            small, address, size = live.pop(key)
            pools[small].release(address)
            total -= size
    return Replay(peak, sum(pool.reserved for pool in pools.values()), needed)
