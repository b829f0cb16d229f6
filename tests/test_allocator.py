"""Expected values: by hand from the rules in c10/cuda/CUDACachingAllocator.cpp (PyTorch 2.13).

And from an H100, whose allocator's every event was recorded.
"""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import numpy
import pytest

from lora_advisor.models.allocator import CachingAllocator, Recording, replay

KIB, MIB = 2**10, 2**20
RECORDINGS = Path(__file__).parent / "recordings"


def take(allocator: CachingAllocator, size: int) -> object:
    """Allocate what must succeed."""
    block = allocator.allocate(size)
    assert block is not None
    return block


@pytest.mark.parametrize(
    ("asked", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (512, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),  # the largest request of the small pool
        (MIB + 1, MIB + 512, 20 * MIB),
        (9 * MIB, 9 * MIB, 20 * MIB),
        (10 * MIB - 1, 10 * MIB, 10 * MIB),  # rounded to 512 first, and then no longer below 10
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (11 * MIB + 1, 12 * MIB, 12 * MIB),  # a rest of at most 1 MiB is not split off
        (31 * MIB, 31 * MIB + MIB, 32 * MIB),
    ],
)
def test_a_first_request_takes_the_segment_of_its_size(
    asked: int, allocated: int, reserved: int
) -> None:
    allocator = CachingAllocator()

    take(allocator, asked)

    assert (allocator.allocated, allocator.reserved) == (allocated, reserved)


def test_small_requests_share_a_segment() -> None:
    allocator = CachingAllocator()

    for _ in range(4):
        take(allocator, 512 * KIB)

    assert allocator.reserved == 2 * MIB
    take(allocator, 1)
    assert allocator.reserved == 4 * MIB


def test_the_pools_do_not_share() -> None:
    allocator = CachingAllocator()

    take(allocator, 2 * MIB)  # leaves 18 MiB of its segment
    take(allocator, 512)

    assert allocator.reserved == 22 * MIB


def test_the_rest_of_a_large_block_is_split_off_above_1_mib() -> None:
    allocator = CachingAllocator()

    take(allocator, 18 * MIB)  # a segment of its own size; nothing is left
    first = take(allocator, 9 * MIB)  # a segment of 20 MiB
    second = take(allocator, 9 * MIB)  # the rest of it, 11 MiB, of which 2 are left

    assert allocator.reserved == 38 * MIB
    take(allocator, 2 * MIB)
    assert allocator.reserved == 38 * MIB
    assert first is not second


def test_a_rest_of_1_mib_goes_with_its_block() -> None:
    allocator = CachingAllocator()
    held = take(allocator, 12 * MIB)
    allocator.release(held)  # type: ignore[arg-type]

    take(allocator, 11 * MIB)

    assert (allocator.allocated, allocator.reserved) == (12 * MIB, 12 * MIB)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 1, 0), (1, 0, 2)])
def test_free_neighbours_become_one_block(order: tuple[int, int, int]) -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(size * MIB) for size in (6, 6, 8)]
    assert allocator.reserved == 20 * MIB

    for index in order:
        block = blocks[index]
        assert block is not None
        allocator.release(block)

    take(allocator, 20 * MIB)
    assert allocator.reserved == 20 * MIB


def test_blocks_that_are_no_neighbours_stay_apart() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(size * MIB) for size in (6, 6, 8)]
    for index in (0, 2):
        block = blocks[index]
        assert block is not None
        allocator.release(block)

    take(allocator, 14 * MIB)

    assert allocator.reserved == 34 * MIB


def test_the_smallest_block_that_is_large_enough_is_taken() -> None:
    allocator = CachingAllocator()
    large, small = allocator.allocate(40 * MIB), allocator.allocate(30 * MIB)
    assert large is not None and small is not None
    allocator.release(large)
    allocator.release(small)

    take(allocator, 30 * MIB)  # not the block of 40 MiB

    take(allocator, 40 * MIB)
    assert allocator.reserved == 70 * MIB


def test_at_the_cap_cached_segments_are_given_back_before_a_request_fails() -> None:
    events = [(1, 60 * MIB, "forward"), (1, -60 * MIB, "forward"), (2, 80 * MIB, "backward")]

    free = replay(events)
    capped = replay(events, cap_bytes=100 * MIB)

    assert (free.reserved_bytes, free.retries, free.survived) == (140 * MIB, 0, True)
    assert (capped.reserved_bytes, capped.retries, capped.survived) == (80 * MIB, 1, True)


def test_a_request_above_the_cap_fails_after_one_retry() -> None:
    result = replay([(1, 60 * MIB, "forward"), (2, 60 * MIB, "forward")], cap_bytes=100 * MIB)

    assert (result.survived, result.retries) == (False, 1)
    assert result.allocated_bytes == 60 * MIB


def test_a_segment_in_use_is_not_given_back() -> None:
    # 6 MiB of the segment of 20 stay in use, so the segment stays.
    events = [
        (1, 6 * MIB, "forward"),
        (2, 9 * MIB, "forward"),
        (2, -9 * MIB, "forward"),
        (3, 90 * MIB, "forward"),
    ]

    assert not replay(events, cap_bytes=100 * MIB).survived
    assert replay(events, cap_bytes=110 * MIB).survived


def test_the_peak_is_where_it_is_reached() -> None:
    events = [
        (1, 4 * MIB, "forward"),
        (2, 8 * MIB, "backward"),
        (1, -4 * MIB, "backward"),
        (3, 2 * MIB, "optimizer"),
    ]

    result = replay(events)

    assert (result.allocated_bytes, result.peak_index) == (12 * MIB, 1)
    assert result.phase_peaks == {
        "forward": 4 * MIB,
        "backward": 12 * MIB,
        "optimizer": 10 * MIB,
    }


def test_an_expandable_segment_grows_by_pages_of_2_and_20_mib() -> None:
    allocator = CachingAllocator(expandable=True)

    take(allocator, 512)
    assert allocator.reserved == 2 * MIB
    take(allocator, 50 * MIB)
    assert allocator.reserved == (2 + 60) * MIB
    take(allocator, 25 * MIB)  # 10 are left of the last page; one page more
    assert allocator.reserved == (2 + 80) * MIB


def test_expandable_segments_do_not_fragment_at_their_end() -> None:
    events = [(1, 60 * MIB, "forward"), (1, -60 * MIB, "forward"), (2, 80 * MIB, "backward")]

    assert replay(events, expandable=True).reserved_bytes == 80 * MIB


def test_an_expandable_segment_gives_back_its_free_end() -> None:
    events = [
        (1, 512, "forward"),
        (2, 60 * MIB, "forward"),
        (2, -60 * MIB, "forward"),
        (3, MIB // 2, "forward"),
        (4, 99 * MIB, "backward"),
    ]

    result = replay(events, cap_bytes=102 * MIB, expandable=True)

    assert result.survived
    assert result.reserved_bytes <= 102 * MIB


#: Weights of 40 MiB lie at the start of a segment of 100; then a step of 50 twice, the second time
#: as a CUDA graph.
GRAPH = [
    (1, 100 * MIB, "load"),
    (1, -100 * MIB, "load"),
    (2, 40 * MIB, "load"),
    (3, 50 * MIB, "forward"),
    (3, -50 * MIB, "backward"),
    (4, 50 * MIB, "forward"),
    (4, -50 * MIB, "backward"),
    (5, 30 * MIB, "optimizer"),
]


def test_a_cuda_graph_cannot_take_what_is_free_beside_something_else() -> None:
    plain, recorded = replay(GRAPH), replay(GRAPH, recorded=Recording(5, 7))

    assert plain.reserved_bytes == 100 * MIB  # 50 of the 60 that are free beside the weights
    assert recorded.reserved_bytes == 150 * MIB  # and what follows lies beside the weights again
    assert recorded.allocated_bytes == plain.allocated_bytes == 100 * MIB
    assert not replay(GRAPH, recorded=Recording(5, 7), cap_bytes=149 * MIB).survived


def test_before_a_cuda_graph_expanding_segments_give_back_what_is_free() -> None:
    recorded = replay(GRAPH, expandable=True, recorded=Recording(5, 7))

    # 40 MiB of weights are two pages of 20; 60 of the graph's own, and 40 more for the optimizer.
    assert recorded.reserved_bytes == (40 + 60 + 40) * MIB


def test_the_libraries_workspaces_pin_no_segment_when_a_graph_is_recorded() -> None:
    events = [
        (1, 90 * MIB, "forward"),
        (1, -90 * MIB, "forward"),
        (2, 32 * MIB, "forward"),  # a workspace, at the start of the free segment
        (3, 90 * MIB, "forward"),
    ]

    assert replay(events, recorded=Recording(3, 4, (2,))).reserved_bytes == (32 + 90) * MIB
    assert replay(events, recorded=Recording(3, 4)).reserved_bytes == (90 + 90) * MIB
    assert not replay(events, recorded=Recording(3, 4, (2,)), cap_bytes=100 * MIB).survived


def test_while_a_graph_is_recorded_the_cache_is_not_given_back() -> None:
    events = [
        (1, 40 * MIB, "load"),
        (2, 50 * MIB, "forward"),
        (1, -40 * MIB, "forward"),  # a block from outside, freed within
        (3, 60 * MIB, "forward"),
    ]

    assert replay(events, cap_bytes=120 * MIB).survived
    assert not replay(events, recorded=Recording(1, 4), cap_bytes=120 * MIB).survived


def test_a_whole_free_segment_goes_back_before_a_cuda_graph_is_recorded() -> None:
    events = [(1, 90 * MIB, "forward"), (1, -90 * MIB, "backward"), (2, 90 * MIB, "forward")]

    assert replay(events, recorded=Recording(2, 3), cap_bytes=100 * MIB).survived


@pytest.mark.parametrize("expandable", [False, True])
@pytest.mark.parametrize("cap", [None, 400 * MIB])
@pytest.mark.parametrize("seed", range(5))
def test_what_is_allocated_stays_below_what_is_reserved_below_the_cap(
    seed: int, cap: int | None, expandable: bool
) -> None:
    random = numpy.random.default_rng(seed)
    allocator = CachingAllocator(cap_bytes=cap, expandable=expandable)
    held: list[tuple[int, Any]] = []
    asked = 0
    for _ in range(2000):
        if held and random.random() < 0.5:
            size, block = held.pop(int(random.integers(len(held))))
            allocator.release(block)
            asked -= size
        else:
            size = int(2 ** random.uniform(0, 25))
            made = allocator.allocate(size)
            if made is not None:
                held.append((size, made))
                asked += size
        assert asked <= allocator.allocated <= allocator.reserved <= allocator.reserved_peak
        assert cap is None or allocator.reserved <= cap
        spans = sorted((block.segment, block.address, block.size) for _, block in held)
        if expandable:
            continue
        assert all(a[0] != b[0] or a[1] + a[2] <= b[1] for a, b in itertools.pairwise(spans)), (
            "two blocks overlap"
        )
    for _, block in held:
        allocator.release(block)
    assert allocator.allocated == 0


@pytest.mark.parametrize(
    ("row", "empties_cache"),
    [(14, True), (27, False)],
    ids=["4-bit experts, which empty the cache", "LoRA"],
)
def test_the_events_of_an_h100_reach_the_peaks_it_reported(row: int, empties_cache: bool) -> None:
    records = (RECORDINGS / "h100-arms-2026-11-24.jsonl").read_text("utf-8").splitlines()
    recorded = json.loads(records[row])
    with gzip.open(RECORDINGS / f"h100-arms-2026-11-24-events-{row}.json.gz") as file:
        events: list[tuple[str, int, int]] = json.load(file)  # action, address, bytes
    actions = [action for action, _, _ in events]
    assert ("segment_free" in actions) == empties_cache
    allocator = CachingAllocator()
    held: dict[int, Any] = {}
    segments = peak = 0

    for (action, address, size), next_action in zip(events, [*actions[1:], ""], strict=True):
        if action == "alloc":
            held[address] = allocator.allocate(size)
            peak = max(peak, allocator.allocated)
            # Of equally large free blocks the one with the lowest address is taken; addresses are
            # the driver's, so after the cache was emptied only the peaks are sure to agree.
            assert empties_cache or allocator.reserved == segments
        elif action == "free_completed":
            allocator.release(held.pop(address))
        elif action == "segment_alloc":
            segments += size
        elif action == "segment_free":
            segments -= size
            if next_action != "segment_free":
                allocator.empty_cache()

    assert peak == recorded["allocated_bytes"]
    assert allocator.reserved_peak == recorded["reserved_bytes"]
