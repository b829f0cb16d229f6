"""Replay a trace on a card's allocator: the peaks, where they lie and what they are made of."""

from __future__ import annotations

import itertools

import numpy

from lora_advisor.models.allocator import MIB, ROUND, Recording, Replay, replay
from lora_advisor.models.traced import TracedMemory
from lora_advisor.probes.events import PHASES, Trace

#: How close to a cap the smallest one survived is looked for, as a share of the cap: outside, the
#: answer is the same whatever it is.
_NEAR = 0.1


#: To how many bytes the smallest cap survived is found.
_FINE = 16 * MIB


def traced_memory(trace: Trace, *, expandable: bool, cap_bytes: int | None = None) -> TracedMemory:
    """Replay a trace on a card's allocator.

    Args:
        trace: The trace.
        expandable: Whether the allocator's segments expand.
        cap_bytes: What the allocator may take; the smallest cap survived is looked for only where
            that may decide. None to look for it in any case.
    """
    events, recorded = staged(trace), recording(trace)
    result = replay(events, expandable=expandable, recorded=recorded)
    smallest = result.reserved_bytes
    if cap_bytes is not None and result.allocated_bytes > cap_bytes * (1 + _NEAR):
        smallest = result.allocated_bytes
    elif cap_bytes is None or result.reserved_bytes > cap_bytes * (1 - _NEAR):
        smallest = needed(events, result, recorded, expandable=expandable, to_bytes=_FINE)
    return TracedMemory(
        allocated_bytes=result.allocated_bytes,
        reserved_bytes=result.reserved_bytes,
        needed_bytes=smallest,
        instant=instant(trace, result.peak_index, events),
        components=components(trace, result),
        phases=result.phase_peaks,
    )


def brief_memory(trace: Trace, *, expandable: bool, cap_bytes: int) -> TracedMemory:
    """Return what decides whether a trace fits a cap, in a tenth of the time.

    Where the live tensors alone are beyond the cap, the figures are lower bounds; stages are left
    out.
    """
    rounded = numpy.sign(trace.sizes) * -(-numpy.abs(trace.sizes) // ROUND) * ROUND
    live = numpy.cumsum(rounded)
    peak = int(live.max(initial=0))
    if peak > cap_bytes * (1 + _NEAR):
        return TracedMemory(
            allocated_bytes=peak,
            reserved_bytes=peak,
            needed_bytes=peak,
            instant="",
            components={},
            phases={},
            least=True,
        )
    stages = itertools.repeat("")
    events = list(zip(trace.blocks.tolist(), trace.sizes.tolist(), stages, strict=False))
    recorded = recording(trace)
    result = replay(events, expandable=expandable, recorded=recorded)
    smallest = result.reserved_bytes
    if smallest > cap_bytes * (1 - _NEAR):
        smallest = needed(events, result, recorded, expandable=expandable, to_bytes=_FINE)
    return TracedMemory(
        allocated_bytes=result.allocated_bytes,
        reserved_bytes=result.reserved_bytes,
        needed_bytes=smallest,
        instant="",
        components=components(trace, result),
        phases={},
    )


def staged(trace: Trace) -> list[tuple[int, int, str]]:
    """Return the trace's events as the allocator's replay takes them, each with its stage.

    The stages are those of PHASES with the loss apart: what runs between the last layer's forward
    pass and the same layer's backward pass.
    """
    names = numpy.array([*PHASES, "loss"], dtype=object)
    inside = trace.layers >= 0
    # Outside the layers; in the forward pass after them, in the backward pass before them.
    turn = numpy.cumsum(numpy.diff(trace.phases, prepend=trace.phases[:1]) != 0)
    seen = numpy.zeros(len(turn), dtype=bool)
    for number in range(int(turn[-1]) + 1 if len(turn) else 0):
        here = turn == number
        seen[here] = numpy.maximum.accumulate(inside[here])
    loss = ~inside & (
        ((trace.phases == PHASES.index("forward")) & seen)
        | ((trace.phases == PHASES.index("backward")) & ~seen)
    )
    stages = numpy.where(loss, len(PHASES), trace.phases)
    return list(
        zip(trace.blocks.tolist(), trace.sizes.tolist(), names[stages].tolist(), strict=True)
    )


def recording(trace: Trace) -> Recording | None:
    """Return what is recorded as a CUDA graph, the second step's micro-batch; None without one.

    The first step runs as it is (`probes/graph_trainer.py`).
    """
    if not any(work.recorded_launches for work in trace.work.values()):
        return None
    in_graph = numpy.isin(trace.phases, (PHASES.index("forward"), PHASES.index("backward")))
    (starts,) = numpy.nonzero(numpy.diff(in_graph.astype(numpy.int8), prepend=0) == 1)
    (stops,) = numpy.nonzero(numpy.diff(in_graph.astype(numpy.int8), append=0) == -1)
    workspaces = tuple(block for block, owner in trace.owners.items() if owner == "workspace")
    return Recording(int(starts[-1]), int(stops[-1]) + 1, workspaces) if len(starts) > 1 else None


def needed(
    events: list[tuple[int, int, str]],
    free: Replay,
    recorded: Recording | None,
    *,
    expandable: bool,
    to_bytes: int,
) -> int:
    """Return the smallest cap, to `to_bytes`, under which the events run through."""
    low, high = free.allocated_bytes, max(free.reserved_bytes, free.allocated_bytes)
    while high - low > to_bytes:
        middle = (low + high) // 2
        if replay(events, cap_bytes=middle, expandable=expandable, recorded=recorded).survived:
            high = middle
        else:
            low = middle
    return high


def instant(trace: Trace, index: int, events: list[tuple[int, int, str]]) -> str:
    """Name the instant of an event for people."""
    stage, layer = events[index][2], int(trace.layers[index])
    if stage == "loss":
        return "loss" if PHASES[trace.phases[index]] == "forward" else "gradient of the loss"
    if stage in ("load", "optimizer"):
        return {"load": "loading", "optimizer": "optimizer step"}[stage]
    return f"{stage} pass" + (" of a layer" if layer >= 0 else "")


def components(trace: Trace, result: Replay) -> dict[str, int]:
    """Return the bytes in use at the peak by owner; rounding is counted as "rounding"."""
    births = numpy.flatnonzero(trace.sizes > 0)
    deaths = numpy.flatnonzero(trace.sizes < 0)
    died_at = numpy.full(int(trace.blocks.max(initial=0)) + 1, len(trace.sizes))
    died_at[trace.blocks[deaths]] = deaths
    died_at = died_at[trace.blocks[births]]
    lives = (births <= result.peak_index) & (died_at > result.peak_index)
    totals: dict[str, int] = {}
    for born, died in zip(births[lives].tolist(), died_at[lives].tolist(), strict=True):
        owner = _owner(trace, born, died)
        totals[owner] = totals.get(owner, 0) + int(trace.sizes[born])
    totals["rounding"] = result.allocated_bytes - sum(totals.values())
    return totals


def _owner(trace: Trace, born: int, died: int) -> str:
    """Return whose a block is that is born and dies at these events."""
    owner = trace.owners.get(int(trace.blocks[born]))
    if owner is not None:
        return owner
    first = PHASES[trace.phases[born]]
    last = PHASES[trace.phases[died]] if died < len(trace.phases) else None
    if first == "backward" and last == "optimizer":
        return "gradients"
    return "activations" if (first, last) == ("forward", "backward") else "working set"
