"""What follows from traces of some sizes is what the traces of others hold."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import pytest
from recorded import configure, tiny

from lora_advisor.models.replayed import traced_memory
from lora_advisor.probes.events import Event, Trace, Work
from lora_advisor.probes.extend import trace_all_layers
from lora_advisor.probes.interpolate import BASES, Family, Size, between, monomials, samples

MIB = 2**20
GRID = [(b, s) for b in (1, 2, 3, 5, 8) for s in (128, 256, 512, 1024, 2048)]

Rule = Callable[[int, int], int]
#: By hand: a weight, the activations, a mask, a bias a sequence.
WITHOUT_SCORES: tuple[Rule, ...] = (
    lambda b, s: 7 * MIB,
    lambda b, s: 3072 * b * s,
    lambda b, s: 1000 + 20 * s,
    lambda b, s: 4096 + 8 * b + 2 * b * s,
)
WITH_SCORES: tuple[Rule, ...] = (*WITHOUT_SCORES, lambda b, s: 24 * b * s * s + s * s)


def step(rules: Sequence[Rule], size: Size, **rest: Any) -> Trace:
    """Return a step that takes a block by each rule, then releases them in their order."""
    numbered = list(enumerate((rule(*size) for rule in rules), start=1))
    events = [Event(number, taken, "forward") for number, taken in numbered]
    events += [Event(number, -taken, "backward") for number, taken in numbered]
    fields: dict[str, Any] = {
        "owners": {},
        "layer_of": {},
        "work": {("forward", 0): Work(matmul_flops=6.0 * size[0] * size[1])},
        "trainable": 1,
        **rest,
    }
    return Trace.of(events, **fields)


def family(rules: Sequence[Rule], sizes: Sequence[Size]) -> Family:
    return Family({size: step(rules, size) for size in sizes})


@pytest.mark.parametrize(
    ("rules", "count"), [(WITHOUT_SCORES, BASES[0]), (WITH_SCORES, BASES[1])], ids=["4", "6"]
)
def test_polynomial_sizes_are_met_to_the_byte(rules: Sequence[Rule], count: int) -> None:
    known = family(rules, samples(GRID, count))

    for size in [*GRID, (4, 384), (16, 4096)]:
        found, expected = known.at(size), step(rules, size)
        assert found is not None
        assert found.events == expected.events
        flops = found.work["forward", 0].matmul_flops
        assert flops == pytest.approx(expected.work["forward", 0].matmul_flops)


def test_too_few_monomials_are_noticed_by_a_size_that_tells() -> None:
    known = family(WITH_SCORES, samples(GRID, BASES[0]))
    other = (8, 512)

    assert not known.agrees(other, step(WITH_SCORES, other), within=1024)
    assert family(WITHOUT_SCORES, samples(GRID, BASES[0])).agrees(
        other, step(WITHOUT_SCORES, other), within=0
    )


def test_sizes_on_a_line_determine_no_plane() -> None:
    line = family(WITHOUT_SCORES, [(2, s) for s in (128, 256, 512, 1024)])

    assert line.at((3, 256)) is None
    on_it = line.at((2, 384))
    assert on_it is not None
    assert on_it.events == step(WITHOUT_SCORES, (2, 384)).events


def other_kinds() -> dict[str, Trace]:
    size = (2, 256)
    plain = step(WITHOUT_SCORES, size).events
    fields: dict[str, Any] = {"owners": {}, "layer_of": {}, "work": {}, "trainable": 1}
    first = plain[0]
    changed = {
        "another block": [*plain, Event(99, 512, "backward")],
        "another phase": [Event(first.block, first.size, "load"), *plain[1:]],
        "another layer": [Event(first.block, first.size, first.phase, 3), *plain[1:]],
        "another order": [plain[1], first, *plain[2:]],
    }
    return {name: Trace.of(events, **fields) for name, events in changed.items()}


@pytest.mark.parametrize("kind", list(other_kinds()))
def test_steps_that_do_different_things_determine_nothing(kind: str) -> None:
    other, sizes = other_kinds()[kind], [(1, 128), (1, 512), (4, 128), (4, 512)]
    known = {size: step(WITHOUT_SCORES, size) for size in sizes}

    assert Family(known).at((2, 256)) is not None
    assert Family(known).alike(step(WITHOUT_SCORES, (2, 256)))
    assert not Family(known).alike(other)
    assert not Family(known).agrees((2, 256), other, within=1 << 40)
    assert Family({**known, (4, 512): other}).at((2, 256)) is None
    assert between(known[1, 128], other, share=0.5) is None


def test_what_full_tiles_leave_over_is_not_taken_below_nothing() -> None:
    tile = 4096
    left_over: tuple[Rule, ...] = (*WITHOUT_SCORES, lambda b, s: 4 * ((b * (s - 1)) % tile))
    low, high = step(left_over, (40, 256)), step(left_over, (48, 256))  # 2008 and 4048 rows

    assert between(low, high, share=0.5) is not None
    assert between(low, high, share=-2.0) is None
    known = Family({(40, 256): low, (48, 256): high})
    assert known.determines((44, 256)) and known.at((44, 256)) is not None
    assert not known.determines((24, 256)) and known.at((24, 256)) is None


def test_the_order_within_a_run_of_releases_does_not_matter() -> None:
    events = step(WITHOUT_SCORES, (4, 512)).events
    half = len(events) // 2
    shuffled = Trace.of(
        [*events[:half], *reversed(events[half:])], owners={}, layer_of={}, work={}, trainable=1
    )
    sizes = [(1, 128), (1, 512), (4, 128)]
    known = Family({**{size: step(WITHOUT_SCORES, size) for size in sizes}, (4, 512): shuffled})

    found = known.at((2, 256))

    assert found is not None
    taken = {event.block: event.size for event in found.events if event.size > 0}
    assert list(taken.values()) == [rule(2, 256) for rule in WITHOUT_SCORES]


@pytest.mark.parametrize("count", BASES)
def test_samples_are_independent(count: int) -> None:
    chosen = samples(GRID, count)

    assert len(set(chosen)) == count
    assert set(chosen) <= set(GRID)
    assert numpy.linalg.matrix_rank(monomials(chosen, count), tol=1e-9) == count


def test_no_more_sizes_are_sampled_than_tell_something() -> None:
    assert len(samples([(2, s) for s in (64, 128, 256, 512, 1024)], BASES[0])) == 2
    assert len(samples([(2, s) for s in (64, 128, 256, 512, 1024)], BASES[1])) == 3
    assert samples([(4, 512)], BASES[1]) == [(4, 512)]


ARMS: dict[str, dict[str, Any]] = {
    "sdpa": {"kernels": "none"},
    "eager": {"attention": "eager", "checkpointing": "off"},
}


@pytest.mark.parametrize("attention", ARMS)
def test_the_trace_of_a_size_follows_from_those_of_others(attention: str) -> None:
    architecture = tiny(num_hidden_layers=3)
    config = configure(loss="full", trainer="transformers", **ARMS[attention])
    grid = list(itertools.product((2, 3, 6), (192, 384, 768)))

    def made(size: Size) -> Trace:
        changed = config.replace(micro_batch=size[0], seq_len=size[1])
        return trace_all_layers(changed, architecture, capability="9.0")

    count = BASES[0] if attention == "sdpa" else BASES[1]
    known = Family({size: made(size) for size in samples(grid, count)})

    for size in [(4, 512), (6, 320)]:
        own, following = made(size), known.at(size)
        assert following is not None
        assert known.agrees(size, own, within=0)
        for expandable in (False, True):
            found = traced_memory(following, expandable=expandable)
            expected = traced_memory(own, expandable=expandable)
            assert found.allocated_bytes == expected.allocated_bytes
            assert found.reserved_bytes == expected.reserved_bytes
            assert found.needed_bytes == expected.needed_bytes
        total = own.total_work()
        assert following.total_work().matmul_flops == pytest.approx(total.matmul_flops)
        assert following.total_work().bytes_moved == pytest.approx(total.bytes_moved)
