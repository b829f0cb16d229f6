"""PyTorch's caching allocator, replayed over a list of allocations and releases.

Source: c10/cuda/CUDACachingAllocator.cpp of PyTorch 2.11 to 2.13: size classes (round_size,
get_allocation_size), best fit (get_free_block), splitting (should_split), coalescing (free_block),
and what happens at the limit (alloc_block, release_cached_blocks).

A CUDA graph's blocks come from segments of its own, and the cache is given back before it is
recorded (torch/cuda/graphs.py, `graph.__enter__`). So what is free in a segment that holds others
too, as the way weights were loaded left it, is lost to the graph; expanding segments give back
pages.

What is not covered: several streams, garbage_collection_threshold, max_split_size_mb,
roundup_power2_divisions; expandable segments are one segment a pool that grows by pages.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

MIB = 2**20
ROUND = 512  # kMinBlockSize
SMALL = MIB  # kSmallSize: the largest request of the small pool
SMALL_SEGMENT = 2 * MIB  # kSmallBuffer
LARGE_SEGMENT = 20 * MIB  # kLargeBuffer
MIN_LARGE = 10 * MIB  # kMinLargeAlloc
ROUND_LARGE = 2 * MIB  # kRoundLarge
#: How far apart the expanding segments of the pools lie, in pages of both kinds.
_APART = LARGE_SEGMENT << 25
#: Addresses are below this power of two: where the last pool's segment begins, three times that,
#: and more than any replay reserves.
_ADDRESS_BITS = 52


@dataclass(frozen=True, slots=True)
class Replay:
    """What a replay came to.

    Attributes:
        allocated_bytes: Largest sum of the blocks in use at one time.
        reserved_bytes: Largest sum of the segments held at one time.
        peak_index: Position of the event at which `allocated_bytes` was reached.
        phase_peaks: Largest sum of blocks in use in each phase, as the events name them.
        survived: Whether every request was met under the cap.
        retries: Times the cache was given back to meet a request.
    """

    allocated_bytes: int
    reserved_bytes: int
    peak_index: int
    phase_peaks: dict[str, int]
    survived: bool
    retries: int


@dataclass(frozen=True, slots=True)
class Recording:
    """What of the events is recorded as a CUDA graph.

    Attributes:
        first: Position of its first event.
        last: Position after its last.
        workspaces: Blocks of the libraries, which are given back before and taken anew by the graph
            (`torch._C._cuda_clearCublasWorkspaces` in probes/graph_trainer.py).
    """

    first: int
    last: int
    workspaces: tuple[int, ...] = ()


class _Block:
    """A piece of a segment; neighbours are linked in address order."""

    __slots__ = ("address", "free", "next", "pool", "previous", "segment", "size")

    def __init__(self, address: int, size: int, pool: _Pool, segment: int) -> None:
        self.address, self.size, self.pool, self.segment = address, size, pool, segment
        self.free = True
        self.previous: _Block | None = None
        self.next: _Block | None = None

    def key(self) -> int:
        """Order by size, then by address, in one number."""
        return self.size << _ADDRESS_BITS | self.address


class _Pool:
    """The free blocks of one size class, smallest first."""

    def __init__(self, small: bool, *, number: int) -> None:
        self.small = small
        self.base = number * _APART  # where its one segment begins, if segments expand
        self.keys: list[int] = []
        self.blocks: dict[int, _Block] = {}
        self.tail: _Block | None = None  # last block of the one segment, if segments expand

    def add(self, block: _Block) -> None:
        key = block.key()
        insort(self.keys, key)
        self.blocks[key] = block

    def remove(self, block: _Block) -> None:
        key = block.key()
        del self.keys[bisect_left(self.keys, key)]
        del self.blocks[key]

    def take_best_fit(self, size: int) -> _Block | None:
        index = bisect_left(self.keys, size << _ADDRESS_BITS)
        return self.blocks.pop(self.keys.pop(index)) if index < len(self.keys) else None


class CachingAllocator:
    """The allocator's state: which blocks are in use and which segments are held."""

    def __init__(self, *, cap_bytes: int | None = None, expandable: bool = False) -> None:
        """Start empty.

        Args:
            cap_bytes: Bytes the segments may sum up to; None for no limit.
            expandable: Whether segments expand (PYTORCH_ALLOC_CONF=expandable_segments:True).
        """
        self.cap_bytes = cap_bytes
        self.expandable = expandable
        self.allocated = 0
        self.reserved = 0
        self.reserved_peak = 0
        self.retries = 0
        self._small, self._large = _Pool(True, number=0), _Pool(False, number=1)
        self._of_graph = _Pool(True, number=2), _Pool(False, number=3)
        self._recording = False
        self._next_address = 0

    def allocate(self, size: int) -> _Block | None:
        """Return a block of at least `size` bytes; None if the cap forbids it."""
        size = max(ROUND, -(-size // ROUND) * ROUND)
        small, large = self._of_graph if self._recording else (self._small, self._large)
        pool = small if size <= SMALL else large
        block = pool.take_best_fit(size) or self._grow(pool, size)
        if block is None and not self._recording:  # CUDACachingAllocator: `captures_underway`
            self.retries += 1
            self.empty_cache()
            block = self._grow(pool, size)
        if block is None:
            return None
        self._split(block, size)
        block.free = False
        self.allocated += block.size
        return block

    def release(self, block: _Block) -> None:
        """Give a block back and join it with free neighbours."""
        self.allocated -= block.size
        block.free = True
        before, after = block.previous, block.next
        if before is not None and before.free:
            block.pool.remove(before)
            block.address, block.size = before.address, block.size + before.size
            block.previous = before.previous
            if before.previous is not None:
                before.previous.next = block
        if after is not None and after.free:
            block.pool.remove(after)
            block.size += after.size
            block.next = after.next
            if after.next is not None:
                after.next.previous = block
            if block.pool.tail is after:
                block.pool.tail = block
        block.pool.add(block)

    def _grow(self, pool: _Pool, size: int) -> _Block | None:
        """Ask the driver for a segment; return its block, which stands in no pool."""
        if self.expandable:
            return self._expand(pool, size)
        need = _segment_size(size)
        if not self._may_hold(need):
            return None
        block = _Block(self._next_address, need, pool, self._next_address)
        self._next_address += need + ROUND
        self._hold(need)
        return block

    def _expand(self, pool: _Pool, size: int) -> _Block | None:
        """Map pages at the end of the pool's one segment."""
        page = _page(pool)
        tail = pool.tail
        spare = tail.size if tail is not None and tail.free else 0
        need = -(-(size - spare) // page) * page
        if not self._may_hold(need):
            return None
        self._hold(need)
        if tail is not None and tail.free:
            pool.remove(tail)
            tail.size += need
            return tail
        address = tail.address + tail.size if tail is not None else pool.base
        block = _Block(address, need, pool, 0)
        block.previous = tail
        if tail is not None:
            tail.next = block
        pool.tail = block
        return block

    def _may_hold(self, more: int) -> bool:
        return self.cap_bytes is None or self.reserved + more <= self.cap_bytes

    def _hold(self, more: int) -> None:
        self.reserved += more
        self.reserved_peak = max(self.reserved_peak, self.reserved)

    def _split(self, block: _Block, size: int) -> None:
        rest = block.size - size
        if rest < ROUND or (not block.pool.small and rest <= SMALL):
            return
        remainder = _Block(block.address + size, rest, block.pool, block.segment)
        remainder.previous, remainder.next = block, block.next
        if block.next is not None:
            block.next.previous = remainder
        block.next, block.size = remainder, size
        if block.pool.tail is block:
            block.pool.tail = remainder
        block.pool.add(remainder)

    def record(self) -> None:
        """Give the cache back, and take what follows from the segments of a CUDA graph."""
        self.empty_cache()
        self._recording = True

    def end_recording(self) -> None:
        """Take what follows from the usual segments; those of the graph stay, for it to replay."""
        self._recording = False

    def empty_cache(self) -> None:
        """Give back every segment that is free as a whole (expanding ones: every free page)."""
        for pool in (self._small, self._large):
            for block in list(pool.blocks.values()):
                if self.expandable:
                    self._unmap(block)
                elif block.previous is None and block.next is None:
                    pool.remove(block)
                    self.reserved -= block.size

    def _unmap(self, block: _Block) -> None:
        """Unmap the whole pages of a free block of an expanding segment.

        What is left of it on either side stays free. The addresses between are not used again
        here: a segment reserves more of them than the card has memory (`ExpandableSegment`).
        """
        pool, page = block.pool, _page(block.pool)
        start = -(-block.address // page) * page
        end = (block.address + block.size) // page * page
        if end <= start:
            return
        pool.remove(block)
        self.reserved -= end - start
        for address, size, after in (
            (block.address, start - block.address, False),
            (end, block.address + block.size - end, True),
        ):
            if size:
                self._beside(block, _Block(address, size, pool, block.segment), after=after)
        block.address, block.size, block.free = start, end - start, False

    def _beside(self, block: _Block, piece: _Block, *, after: bool) -> None:
        """Link a free piece into a segment, before or after a block of it."""
        if after:
            piece.previous, piece.next, block.next = block, block.next, piece
            if piece.next is not None:
                piece.next.previous = piece
            elif block.pool.tail is block:
                block.pool.tail = piece
        else:
            piece.previous, piece.next, block.previous = block.previous, block, piece
            if piece.previous is not None:
                piece.previous.next = piece
        block.pool.add(piece)


def _page(pool: _Pool) -> int:
    return SMALL_SEGMENT if pool.small else LARGE_SEGMENT


def _segment_size(size: int) -> int:
    if size <= SMALL:
        return SMALL_SEGMENT
    if size < MIN_LARGE:
        return LARGE_SEGMENT
    return -(-size // ROUND_LARGE) * ROUND_LARGE


def replay(
    events: Iterable[tuple[int, int, str]],
    *,
    cap_bytes: int | None = None,
    expandable: bool = False,
    recorded: Recording | None = None,
) -> Replay:
    """Run events through the allocator.

    Args:
        events: (block, bytes, phase); bytes are negative where the block is released, and 0 where
            the cache is given back.
        cap_bytes: As for CachingAllocator.
        expandable: As for CachingAllocator.
        recorded: What of them is a CUDA graph; None without one.
    """
    allocator = CachingAllocator(cap_bytes=cap_bytes, expandable=expandable)
    held: dict[int, _Block] = {}
    phase_peaks: dict[str, int] = {}
    peak, peak_index, survived = 0, 0, True
    for index, (number, size, phase) in enumerate(events):
        if recorded is not None and index in (recorded.first, recorded.last):
            survived = _turn(allocator, held, recorded, begins=index == recorded.first) and survived
        if size < 0:
            allocator.release(held.pop(number))
            continue
        if size == 0:
            allocator.empty_cache()
            continue
        block = allocator.allocate(size) if survived else None
        if block is None:
            survived = False
            break
        held[number] = block
        if allocator.allocated > phase_peaks.get(phase, 0):
            phase_peaks[phase] = allocator.allocated
        if allocator.allocated > peak:
            peak, peak_index = allocator.allocated, index
    return Replay(
        peak, allocator.reserved_peak, peak_index, phase_peaks, survived, allocator.retries
    )


def _turn(
    allocator: CachingAllocator, held: dict[int, _Block], recorded: Recording, *, begins: bool
) -> bool:
    """Begin or end a recording; return whether the workspaces find room in the graph's memory."""
    if not begins:
        allocator.end_recording()
        return True
    sizes = {number: held[number].size for number in recorded.workspaces if number in held}
    for number in sizes:
        allocator.release(held.pop(number))
    allocator.record()
    for number, size in sizes.items():
        block = allocator.allocate(size)
        if block is None:
            return False
        held[number] = block
    return True
