"""From a trace, and the probes there are, to the memory a run needs.

Physics comes from the trace; only what card and stack decide is learnt from probes: the context
and the gap between the traced and the measured reserve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lora_advisor.models.allocator import MIB, Replay, replay
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.events import Trace
from lora_advisor.probes.prediction import MemoryPrediction

#: CUDA context by compute capability, measured: H100 after its last step, the largest in
#: tests/recordings (84 MiB less in two runs that ran out of memory), T4 by fitcheck-llm 0.3.1.
#: Others are assumed, and the bound says so.
_CONTEXT = {"9.0": 770 * MIB, "7.5": 141 * MIB}
_ASSUMED_CONTEXT = 256 * MIB
_ASSUMED_CONTEXT_UPPER = 512 * MIB

#: One-sided error of the traced reserve, as a share of it: above the 95th percentile of measured
#: over traced reserve in benchmarks/results/trace_accuracy.json ("reserved_upper"; tested).
TRACED_RESERVED_UPPER = 0.15
#: Added for compiled layers, which are traced in their eager form: the recorded run stands 8 %
#: above its trace.
_COMPILED_UPPER = 0.10


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a process holds on the card beside the allocator's memory.

    Attributes:
        value_bytes: Most likely.
        upper_bytes: Bound.
        measured: Whether it was measured on this card (or one of its kind) or is assumed.
    """

    value_bytes: int
    upper_bytes: int
    measured: bool


def context_of(capability: str | None, measured_bytes: int | None = None) -> Context:
    """Return the context of a card, measured here, measured on its kind, or assumed."""
    if measured_bytes is not None:
        return Context(value_bytes=measured_bytes, upper_bytes=measured_bytes, measured=True)
    if capability in _CONTEXT:
        value = _CONTEXT[capability]
        return Context(value_bytes=value, upper_bytes=value, measured=True)
    return Context(value_bytes=_ASSUMED_CONTEXT, upper_bytes=_ASSUMED_CONTEXT_UPPER, measured=False)


@dataclass(frozen=True, kw_only=True)
class TracedMemory:
    """What a trace comes to on a card, before anything is learnt from probes.

    Attributes:
        allocated_bytes: Peak of live tensors.
        reserved_bytes: Peak of the caching allocator without a cap.
        needed_bytes: Smallest cap the run survives, as far as it was worth finding out.
        instant: Where the peak lies.
        components: Bytes at the peak by owner.
        phases: Peak of live tensors in each phase.
    """

    allocated_bytes: int
    reserved_bytes: int
    needed_bytes: int
    instant: str
    components: Mapping[str, int]
    phases: Mapping[str, int]


def traced_memory(
    trace: Trace,
    capability: str | None,
    *,
    expandable: bool,
    ample_bytes: int = 0,
    limit_bytes: int | None = None,
) -> TracedMemory:
    """Replay a trace on a card's allocator.

    Args:
        trace: The trace.
        capability: Compute capability of the card.
        expandable: Whether the allocator's segments expand.
        ample_bytes: Where the reserve stays below, nobody asks for the smallest cap, and it is not
            looked for.
        limit_bytes: Nor where the live tensors alone are above this; the peak of the live tensors
            is returned for it.
    """
    events = device_events(trace, capability)
    result = replay(events, expandable=expandable)
    smallest = result.reserved_bytes
    if limit_bytes is not None and result.allocated_bytes > limit_bytes:
        smallest = result.allocated_bytes
    elif result.reserved_bytes > ample_bytes:
        smallest = needed(events, result, expandable=expandable)
    return TracedMemory(
        allocated_bytes=result.allocated_bytes,
        reserved_bytes=result.reserved_bytes,
        needed_bytes=smallest,
        instant=instant(trace, result.peak_index, events),
        components=components(trace, events, result),
        phases=result.phase_peaks,
    )


def device_events(trace: Trace, capability: str | None = None) -> list[tuple[int, int, str]]:
    """Return the trace's events as the allocator's replay takes them."""
    return [(event.block, event.size, event.phase) for event in trace.events]


@dataclass(frozen=True)
class MemoryModel:
    """Traced memory, corrected by what probes on this card and stack measured.

    Attributes:
        capability: Compute capability of the card.
        context: What the process holds beside the allocator's memory.
        reserved_gap: Measured over traced reserve, from the probes; 1 without any.
        upper: One-sided relative error of the reserve.
        probes: Number of probes behind the correction.
    """

    capability: str | None
    context: Context
    reserved_gap: float = 1.0
    upper: float = TRACED_RESERVED_UPPER
    probes: int = 0

    @classmethod
    def fit(
        cls,
        capability: str | None,
        context: Context,
        pairs: Sequence[tuple[int, int]],
    ) -> MemoryModel:
        """Learn from probes.

        Args:
            capability: Of the card.
            context: Of the card.
            pairs: (traced, measured) reserved bytes of the probes that ended well and never had to
                give back cached memory.
        """
        if not pairs:
            return cls(capability, context)
        import numpy
        from sklearn.linear_model import Ridge

        traced = numpy.array([pair[0] for pair in pairs], dtype=float)
        measured = numpy.array([pair[1] for pair in pairs], dtype=float)
        # The gap as a share of the traced reserve, drawn to 0 by one pseudo-observation, so that
        # a single probe does not swing the model.
        relative = measured / traced - 1
        ridge = Ridge(alpha=1.0, fit_intercept=False).fit(numpy.ones((len(pairs), 1)), relative)
        gap = float(ridge.coef_[0])
        left = relative - gap
        spread = float(numpy.max(left, initial=0.0))
        # With n probes the largest residual seen is exceeded once in n + 1 times; between that and
        # the traced bound, weigh by the number of probes.
        weight = len(pairs) / (len(pairs) + 4)
        upper = weight * spread + (1 - weight) * TRACED_RESERVED_UPPER
        return cls(capability, context, 1.0 + gap, upper, len(pairs))

    def predict(self, traced: TracedMemory, config: RunConfig) -> MemoryPrediction:
        """Return the memory of a run from what its trace came to."""
        reserved = max(traced.allocated_bytes, round(traced.reserved_bytes * self.reserved_gap))
        bound = self.upper + (_COMPILED_UPPER if config.compile != "off" else 0.0)
        return MemoryPrediction(
            allocated_bytes=traced.allocated_bytes,
            reserved_bytes=reserved,
            process_bytes=reserved + self.context.value_bytes,
            process_upper_bytes=round(reserved * (1 + bound)) + self.context.upper_bytes,
            needed_bytes=min(reserved, traced.needed_bytes),
            instant=traced.instant,
            components=dict(traced.components),
            phases=dict(traced.phases),
            evidence="probed" if self.probes else "traced",
        )

    def verdict(self, config: RunConfig, memory: MemoryPrediction, limit_bytes: int) -> str:
        """Say whether a run fits a card's memory less the reserve.

        It fits where the bound of the process is within the limit; it does not where even the
        smallest cap it survives is above; between, only a run can tell. So it is for a model that
        is compiled as a whole, whose memory the eager trace does not bound.
        """
        if memory.process_upper_bytes <= limit_bytes and config.compile != "model":
            return "fits"
        if memory.needed_bytes + self.context.value_bytes > limit_bytes:
            return "does not fit"
        return "uncertain"


def needed(events: list[tuple[int, int, str]], free: Replay, *, expandable: bool) -> int:
    """Return the smallest cap, to 64 MiB, under which the events run through."""
    low, high = free.allocated_bytes, max(free.reserved_bytes, free.allocated_bytes)
    while high - low > 64 * MIB:
        middle = (low + high) // 2
        if replay(events, cap_bytes=middle, expandable=expandable).survived:
            high = middle
        else:
            low = middle
    return high


def instant(trace: Trace, index: int, events: list[tuple[int, int, str]]) -> str:
    """Name the instant of an event for people."""
    block, _, phase = events[index]
    layer = next((e.layer for e in trace.events if e.block == block and e.size > 0), -1)
    if phase == "load":
        return "loading"
    if phase == "optimizer":
        return "optimizer step"
    if layer < 0:
        return "loss" if phase == "forward" else "gradient of the loss"
    return "forward pass of a layer" if phase == "forward" else "backward pass of a layer"


@dataclass
class _Life:
    """Birth and death of a block."""

    size: int
    born: str
    born_at: int
    died: str | None = None
    died_at: int = field(default=1 << 62)


def components(trace: Trace, events: list[tuple[int, int, str]], result: Replay) -> dict[str, int]:
    """Return the bytes in use at the peak by owner; rounding is counted as "rounding"."""
    lives: dict[int, _Life] = {}
    for index, (block, size, phase) in enumerate(events):
        if size > 0:
            lives[block] = _Life(size, phase, index)
        elif size < 0:
            lives[block].died, lives[block].died_at = phase, index
    totals: dict[str, int] = {}
    for block, life in lives.items():
        if life.born_at <= result.peak_index < life.died_at:
            owner = _owner(block, life, trace.owners)
            totals[owner] = totals.get(owner, 0) + life.size
    totals["rounding"] = result.allocated_bytes - sum(totals.values())
    return totals


def _owner(block: int, life: _Life, owners: Mapping[int, str]) -> str:
    if block in owners:
        return owners[block]
    if life.born == "backward" and life.died == "optimizer":
        return "gradients"
    if life.born == "forward" and life.died == "backward":
        return "activations"
    return "working set"
