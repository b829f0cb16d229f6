"""Which configuration to measure next: the one whose measurement is expected to change most.

A candidate's speed is uncertain: its logarithm is normal around what the models say. What it is
expected to add to the best speed measured (expected improvement, Jones et al. 1998, equation 15),
weighed by the chance that it fits, for each second that its probe takes, decides.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from lora_advisor.models.memory import graph_bytes
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.exchange import LEAST_WARMUP_STEPS
from lora_advisor.probes.prediction import Prediction
from lora_advisor.probes.record import ProbeResult

#: A candidate must be able to beat the best measured one by this much to be worth a probe.
WORTH = 1.02
#: It is able to where the chance is at least this; the reverse of nine of ten, one-sided.
LIKELY = 0.05
#: Chance that a configuration runs which the models say fits.
_FITS = 0.97
#: How far, as a share, the smallest cap survived strays from what is predicted; of compiled layers
#: more. And how much likelier to fail is a run that must give back cached memory on the way.
_STRAYS, _STRAYS_COMPILED, _FLUSHING = 0.02, 0.04, 0.5

#: What is left of the chance to run where the models give a configuration as much memory as one of
#: other checkpointing or size that ran out of it: a guess, for they may err on the one and not on
#: the other.
AFTER_FAILURE = 0.2
#: A failure is near what the models expect where they give it at least this share of the cap.
EXPLAINED = 0.9
#: Standard deviation of the logarithm of the time of code that no probe ran: whole arms of the
#: recorded H100 steps stray so far (tests/recordings/regret).
NEW_CODE = 0.2

#: Seconds of a probe beside its steps before the first one tells: start and weights, compilation;
#: and all of that of another engine, which starts anew and compiles in every process.
_START_S, _COMPILE_S, _ENGINE_S = 8.0, 20.0, 75.0


@dataclass(frozen=True, kw_only=True)
class Promise:
    """What a candidate may reach.

    Attributes:
        tokens_per_s: Most likely.
        deviation: Standard deviation of its logarithm.
        chance: That it runs.
    """

    tokens_per_s: float
    deviation: float
    chance: float

    def improvement(self, best: float) -> float:
        """Return the expected gain over the best speed, as a share of it."""
        mean, deviation = math.log(self.tokens_per_s / best), max(self.deviation, 1e-6)
        normal = statistics.NormalDist()
        upper = mean / deviation
        gain = math.exp(mean + deviation**2 / 2) * normal.cdf(upper + deviation)
        return self.chance * max(0.0, gain - normal.cdf(upper))

    def may_beat(self, best: float) -> bool:
        """Whether it can be faster than the best by what is worth a probe."""
        needed = math.log(WORTH * best / self.tokens_per_s)
        above = statistics.NormalDist(0, max(self.deviation, 1e-6)).cdf(-needed)
        return self.chance * above >= LIKELY


def chance_of(config: RunConfig, prediction: Prediction, cap_bytes: int) -> float:
    """Return the chance that a configuration runs under a cap of the allocator."""
    if prediction.verdict != "uncertain":
        return _FITS if prediction.verdict == "fits" else 0.0
    memory = prediction.memory
    strays = _STRAYS if config.compile == "off" else _STRAYS_COMPILED
    cap_bytes -= graph_bytes(config)
    normal = statistics.NormalDist(memory.needed_bytes, strays * memory.needed_bytes)
    flushes = config.allocator == "default" and memory.reserved_bytes > cap_bytes
    return _FITS * normal.cdf(cap_bytes) * (_FLUSHING if flushes else 1.0)


@dataclass
class Costs:
    """What probes take, learnt as they run.

    Attributes:
        starts: Seconds beside steps and compilation, of each probe so far.
        compilations: Seconds of compilation, of each probe that compiled.
        engines: Seconds beside the steps, of each probe of another engine.
    """

    starts: list[float] = field(default_factory=list)
    compilations: list[float] = field(default_factory=list)
    engines: list[float] = field(default_factory=list)

    def note(self, result: ProbeResult, wall_s: float) -> None:
        """Learn from a probe that took `wall_s` in all."""
        if result.outcome != "ok" or result.step_s is None:
            return
        if not result.config.is_buildable:
            steps = LEAST_WARMUP_STEPS + len(result.step_times_s)
            self.engines.append(max(0.0, wall_s - steps * result.step_s))
            return
        stepping = (result.warmup_s or 0.0) + sum(result.step_times_s)
        self.starts.append(max(0.0, wall_s - stepping))
        if result.config.compile != "off":
            self.compilations.append(result.start_s)

    @property
    def engine_start_s(self) -> float:
        """What a probe of another engine takes beside its steps."""
        return max(self.engines, default=_ENGINE_S)

    def expected_s(self, config: RunConfig, step_s: float | None, steps: int) -> float:
        """Return the seconds that a probe of so many steps is expected to take."""
        if not config.is_buildable:
            return self.engine_start_s + steps * (step_s or 1.0)
        start = statistics.median(self.starts) if self.starts else _START_S
        compilation = 0.0
        if config.compile != "off":
            compilation = max(self.compilations, default=_COMPILE_S)
        return start + compilation + steps * (step_s or 1.0)


def most_promising(
    promises: Sequence[tuple[RunConfig, Promise, float]], best: float
) -> RunConfig | None:
    """Return the candidate to measure next; None where none can beat the best.

    Args:
        promises: Candidates, what they may reach, and the seconds their probes take.
        best: The best speed measured, in tokens per second.
    """
    open_ = [item for item in promises if item[1].may_beat(best)]
    if not open_:
        return None
    return max(open_, key=lambda item: item[1].improvement(best) / item[2])[0]
