"""From a trace, and the probes there are, to the memory a run needs.

Physics comes from the trace; only what card and stack decide is learnt from probes, each term by
itself: the context, workspaces, slopes, and the gap between the reserve and the live tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from lora_advisor.models.allocator import MIB
from lora_advisor.models.traced import TracedMemory
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.prediction import MemoryPrediction

#: CUDA context by compute capability, measured: H100 after its last step, the largest in
#: tests/recordings (84 MiB less in two runs that ran out of memory), T4 by fitcheck-llm 0.3.1.
#: Others are assumed, and the bound says so.
_CONTEXT = {"9.0": 770 * MIB, "7.5": 141 * MIB}
_ASSUMED_CONTEXT = 256 * MIB
_ASSUMED_CONTEXT_UPPER = 512 * MIB

#: What the driver holds for CUDA graphs beside the context and the allocator's memory: 86 MiB after
#: a graph of 4,000 kernels, 88 after one of 8,000 (tests/recordings/h100-graphs-2026-11-27.jsonl;
#: read when the graph was gone, so it may have been more while it was there).
_GRAPHS = 88 * MIB

#: One-sided relative error of the traced reserve: above the 95th percentile of measured over traced
#: in benchmarks/results/trace_accuracy.json ("reserved_upper"; tested).
TRACED_RESERVED_UPPER = 0.15
#: The same of the smallest cap a run survives, which fragmentation moves less: it follows the live
#: tensors. Upwards and downwards; "allocated_upper" and "allocated_lower" there.
TRACED_NEEDED_UPPER = 0.03
TRACED_NEEDED_LOWER = 0.02
#: Added for compiled layers: what Inductor keeps is derived, not run.
_COMPILED_UPPER = 0.10

#: What probes may teach, as standard deviations before the first: bytes of workspaces that the
#: trace does not know, and the share of what lives within a step; then the same of the gap between
#: reserve and live tensors. And how far a single run strays, as a share of its memory.
_ALLOCATED_PRIOR = (8 * MIB, 0.002)
_GAP_PRIOR = (32 * MIB, 0.1)
_ALLOCATED_NOISE, _GAP_NOISE = 0.005, 0.03

#: Parts of the peak that stay from step to step; the rest lives within one.
_PERSISTENT = ("weights", "adapter", "optimizer", "gradients", "workspace")


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


def graph_bytes(config: RunConfig) -> int:
    """Return what a configuration's CUDA graphs take beside context and allocator."""
    return 0 if config.cuda_graph == "off" else _GRAPHS


def context_of(capability: str | None, measured_bytes: int | None = None) -> Context:
    """Return the context of a card, measured here, measured on its kind, or assumed."""
    if measured_bytes is not None:
        return Context(value_bytes=measured_bytes, upper_bytes=measured_bytes, measured=True)
    if capability in _CONTEXT:
        value = _CONTEXT[capability]
        return Context(value_bytes=value, upper_bytes=value, measured=True)
    return Context(value_bytes=_ASSUMED_CONTEXT, upper_bytes=_ASSUMED_CONTEXT_UPPER, measured=False)


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What a probe measured, beside what its trace comes to; in bytes."""

    traced: TracedMemory
    allocated_bytes: int
    reserved_bytes: int


@dataclass(frozen=True)
class MemoryModel:
    """Traced memory, corrected by what probes on this card and stack measured.

    Attributes:
        capability: Compute capability of the card.
        context: What the process holds beside the allocator's memory.
        allocated: Learnt of the live tensors: bytes added, and share of what lives within a step.
        gap: Learnt of the reserve beyond them: bytes added, and share of it.
        upper: One-sided relative error of the reserve.
        needed_upper: Of the smallest cap survived.
        probes: Number of probes behind the correction.
    """

    capability: str | None
    context: Context
    allocated: tuple[float, float] = (0.0, 0.0)
    gap: tuple[float, float] = (0.0, 0.0)
    upper: float = TRACED_RESERVED_UPPER
    needed_upper: float = TRACED_NEEDED_UPPER
    probes: int = 0

    @classmethod
    def fit(
        cls, capability: str | None, context: Context, observed: Sequence[Observed]
    ) -> MemoryModel:
        """Learn from probes, term by term; what they do not speak of stays as traced.

        Args:
            capability: Of the card.
            context: Of the card.
            observed: Probes that ended well and never had to give back cached memory.
        """
        if not observed:
            return cls(capability, context)
        allocated = _learn(
            [_within_step(o.traced) for o in observed],
            [o.allocated_bytes - o.traced.allocated_bytes for o in observed],
            [_ALLOCATED_NOISE * o.traced.allocated_bytes for o in observed],
            _ALLOCATED_PRIOR,
        )
        gap = _learn(
            [_gap(o.traced) for o in observed],
            [o.reserved_bytes - o.allocated_bytes - _gap(o.traced) for o in observed],
            [_GAP_NOISE * o.traced.reserved_bytes for o in observed],
            _GAP_PRIOR,
        )
        model = cls(capability, context, allocated, gap, probes=len(observed))
        both = [(o, *model._corrected(o.traced)) for o in observed]
        return dataclasses.replace(
            model,
            upper=_bound([o.reserved_bytes / r - 1 for o, _, r in both], TRACED_RESERVED_UPPER),
            # Probes may widen this bound and never narrow it: it was calibrated on many more runs.
            needed_upper=max(TRACED_NEEDED_UPPER, *(o.allocated_bytes / a - 1 for o, a, _ in both)),
        )

    def _corrected(self, traced: TracedMemory) -> tuple[float, float]:
        """Return the live tensors and the reserve with what was learnt."""
        offset, share = self.allocated
        allocated = traced.allocated_bytes + offset + share * _within_step(traced)
        more, factor = self.gap
        return allocated, allocated + max(0.0, more + (1 + factor) * _gap(traced))

    def predict(self, traced: TracedMemory, config: RunConfig) -> MemoryPrediction:
        """Return the memory of a run from what its trace came to."""
        allocated, reserved = (round(size) for size in self._corrected(traced))
        share = (traced.needed_bytes - traced.allocated_bytes) / max(1, _gap(traced))
        bound = self.upper + (_COMPILED_UPPER if config.compile != "off" else 0.0)
        graphs = graph_bytes(config)
        return MemoryPrediction(
            allocated_bytes=allocated,
            reserved_bytes=reserved,
            process_bytes=reserved + self.context.value_bytes + graphs,
            process_upper_bytes=round(reserved * (1 + bound)) + self.context.upper_bytes + graphs,
            # What probes teach may raise it and never lowers it: it decides what is said to fit.
            needed_bytes=max(
                traced.needed_bytes, round(allocated + min(1.0, share) * (reserved - allocated))
            ),
            instant=traced.instant,
            components=dict(traced.components),
            phases=dict(traced.phases),
            evidence="probed" if self.probes else "traced",
        )

    def most_bytes(self, config: RunConfig, memory: MemoryPrediction) -> float:
        """Return what a card must have free for a run to be said to fit."""
        upper = self.needed_upper + (_COMPILED_UPPER if config.compile != "off" else 0.0)
        most = memory.needed_bytes * (1 + upper)
        if config.allocator == "default":
            most = max(most, memory.reserved_bytes)
        return most + self.context.upper_bytes + graph_bytes(config)

    def verdict(self, config: RunConfig, memory: MemoryPrediction, limit_bytes: int) -> str:
        """Say whether a run fits a card's memory less the reserve.

        It fits where the smallest cap it survives, with its error, is within the limit and the
        allocator need not give back cached memory to stay there: segments that do not expand may be
        too cut up for that by then. It does not fit where the smallest cap survived is above, with
        its error the other way. Between, only a run can tell. So it is where what is compiled is
        not bounded by the trace: a whole model, and 4-bit layers, of which one torch keeps three
        times what another does.
        """
        packed = config.compile == "layers" and config.method == "qlora"
        bounded = config.compile != "model" and not packed
        if self.most_bytes(config, memory) <= limit_bytes and bounded:
            return "fits"
        beside = self.context.value_bytes + graph_bytes(config)
        least = memory.needed_bytes * (1 - TRACED_NEEDED_LOWER) + beside
        return "does not fit" if least > limit_bytes else "uncertain"


def _within_step(traced: TracedMemory) -> int:
    return traced.allocated_bytes - sum(traced.components.get(name, 0) for name in _PERSISTENT)


def _gap(traced: TracedMemory) -> int:
    return traced.reserved_bytes - traced.allocated_bytes


def _learn(
    sizes: Sequence[float],
    differences: Sequence[float],
    noise: Sequence[float],
    prior: tuple[float, float],
) -> tuple[float, float]:
    """Return the constant and the slope in `differences`, drawn to 0 as their prior says.

    Ridge regression is the most probable answer where each coefficient is normal around 0: divided
    by its noise, an observation weighs as much as the prior's own.
    """
    import numpy
    from sklearn.linear_model import Ridge

    error = numpy.array(noise, dtype=float)
    columns = numpy.array([[1.0] * len(sizes), list(sizes)]).T * numpy.array(prior)
    ridge = Ridge(alpha=1.0, fit_intercept=False)
    ridge.fit(columns / error[:, None], numpy.array(differences, dtype=float) / error)
    constant, slope = ridge.coef_ * numpy.array(prior)
    return float(constant), float(slope)


def _bound(residuals: Sequence[float], traced: float) -> float:
    """Return a one-sided error from the probes' residuals and that of the trace alone.

    With n probes the largest residual is exceeded once in n + 1 times (conformal prediction,
    arXiv 2107.07511, section 1); between it and the traced error, weigh by the number of probes.
    Half of the traced error stays in any case.
    """
    weight = len(residuals) / (len(residuals) + 4)
    return max(traced / 2, weight * max(0.0, *residuals) + (1 - weight) * traced)
