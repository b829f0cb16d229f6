"""A map of sizes holds what single replays come to, from far fewer traces."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from recorded import configure, tiny
from traced_once import trace_here

from lora_advisor.advisor import traces
from lora_advisor.advisor.sizes import SizeMap
from lora_advisor.advisor.traces import TraceStore, resized
from lora_advisor.models.replayed import traced_memory
from lora_advisor.probes.extend import trace_all_layers
from lora_advisor.probes.interpolate import Size
from lora_advisor.probes.trace_batch import trace_quietly

CAP = 1 << 40  # beyond every step here, so that no cap is looked for
SIZES = list(itertools.product((1, 2, 3, 4, 6, 8, 12), (128, 192, 256, 320, 384, 512, 640, 768)))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Size]:
    """Sizes that were traced."""
    sizes: list[Size] = []

    def counted(config: Any, *rest: Any) -> Any:
        sizes.append((config.micro_batch, config.seq_len))
        return trace_quietly(config, *rest)

    monkeypatch.setattr(traces, "trace_quietly", counted)
    trace_here(monkeypatch)
    return sizes


#: Changes of the configuration and of the figures, cells to compare, and the most traces made.
ARMS: dict[str, tuple[dict[str, Any], dict[str, Any], list[Size], int]] = {
    "QLoRA, whose kernels change with the tokens": (
        {"method": "qlora"},
        {},
        [(1, 128), (2, 192), (6, 384)],
        16,
    ),
    "eager attention": (
        {"attention": "eager", "trainer": "transformers", "loss": "full"},
        {},
        [(1, 384), (4, 256), (8, 512)],
        16,
    ),
    "a sliding window": (
        {"trainer": "transformers", "loss": "full"},
        {"model_type": "mistral", "sliding_window": 256},
        [(1, 192), (1, 768), (6, 256), (4, 512)],
        # Batches of one part from the others, below the window and above it: too few for a family.
        20,
    ),
}


@pytest.mark.parametrize("name", ARMS)
def test_a_map_of_sizes_holds_what_single_replays_come_to(made: list[Size], name: str) -> None:
    changes, figures, cells, most = ARMS[name]
    architecture = tiny(num_hidden_layers=2, **figures)
    config = configure(**changes)
    store = TraceStore(architecture, "9.0")

    answers = SizeMap(store, config, CAP).memory(SIZES)

    assert list(answers) == SIZES and len(SIZES) == 56
    assert len(made) == len(set(made)) <= most
    for size in cells:
        trace = trace_all_layers(resized(config, size), architecture, capability="9.0")
        single = traced_memory(trace, expandable=False, cap_bytes=CAP)
        # A block may differ by its rounding to 512 bytes.
        assert answers[size].allocated_bytes == pytest.approx(single.allocated_bytes, rel=1e-4)
        assert answers[size].reserved_bytes == single.reserved_bytes
        assert not answers[size].least


def test_sizes_asked_for_again_are_not_traced_again(made: list[Size]) -> None:
    sizes = SizeMap(TraceStore(tiny(num_hidden_layers=2), "9.0"), configure(), CAP)
    first = sizes.memory(SIZES[:3])
    count = len(made)

    assert sizes.memory(SIZES[1:3]) == {size: first[size] for size in SIZES[1:3]}
    assert len(made) == count == 3


def test_a_size_whose_live_tensors_are_beyond_the_cap_is_bounded_from_below() -> None:
    architecture, config = tiny(num_hidden_layers=2), configure()
    store, size = TraceStore(architecture, "9.0"), (8, 768)
    exact = SizeMap(store, config, CAP).memory([size])[size]
    cap = exact.allocated_bytes // 2

    bounded = SizeMap(store, config, cap).memory([size])[size]

    assert bounded.least
    assert cap < bounded.needed_bytes <= exact.needed_bytes


def test_a_size_near_the_cap_has_the_smallest_cap_it_survives() -> None:
    architecture, config = tiny(num_hidden_layers=2), configure()
    store, size = TraceStore(architecture, "9.0"), (8, 768)
    trace = trace_all_layers(resized(config, size), architecture, capability="9.0")
    single = traced_memory(trace, expandable=False)

    near = SizeMap(store, config, single.reserved_bytes).memory([size])[size]

    # `brief_memory` finds it to a hundredth of the cap, `traced_memory` to 16 MiB.
    assert near.needed_bytes == pytest.approx(
        single.needed_bytes, abs=single.reserved_bytes // 100 + (16 << 20)
    )
    assert near.allocated_bytes <= near.needed_bytes <= near.reserved_bytes
