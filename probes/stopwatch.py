"""Time the steps of a trainer: warm-up apart, each measured step by three clocks.

    step:   ... end i-1 | look | load rows | begin i | forward, backward, optimizer | wait | end i
    wall                       |<------------------------------------------------------->|
    host                       |<------------------------------------------------->|
    device                                 |<--------------------------------------->|

The device is waited for after every step, so that no step pays for another. Between two steps the
watch looks at the device's energy, clock and temperature, when nobody's time runs.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from lora_advisor.probes.energy import BOARD_POWER, LEAST_SPAN_S, Gauge
from lora_advisor.probes.meter import Condition, Meter, watch_attention

#: Stop for time only once the median stands on this many steps.
LEAST_MEASURED_STEPS = 3
#: A median is steady while its standard error is at most this share of it. Of 44 runs recorded on
#: an H100, 6 to 12 steps each, ten were less steady: it waited for a busy host.
STEADY = 0.05
#: Measure at most this many times the steps asked for.
PATIENCE = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A measured step.

    Attributes:
        wall_s: From the end of the step before to this one's.
        host_s: Until the host had issued the step. A trainer that reads a value back from the
            device within the step (TRL logs the accuracy) waits there, and that counts.
        device_s: Between events on the device; None on a CPU.
        span_s: Between the two readings of the energy around the step.
        joules: Energy of that span.
        condition: State of the device at the step's end.
        compiled: Whether code was compiled in this step: its time is not that of a step.
    """

    wall_s: float
    host_s: float
    device_s: float | None
    span_s: float
    joules: float | None
    condition: Condition | None
    compiled: bool


class Stopwatch:
    """The clocks of one run; `step_begins` and `step_ends` are called around each step.

    Attributes:
        warmup_s: Time from the first step's begin to the last warm-up step's end.
        attention: Attention kernel of the last warm-up step, the profiled one.
        energy_source: Where the energy comes from; None if it is unknown.
    """

    def __init__(
        self,
        meter: Meter,
        *,
        warmup_steps: int,
        measured_steps: int,
        max_seconds: float,
        on_first_step: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        """Set how many steps there will be."""
        self._meter = meter
        self._warmup_steps = warmup_steps
        self._measured_steps = measured_steps
        self._max_seconds = max_seconds
        self._on_first_step = on_first_step
        self._clock = clock
        self._done = 0
        self._first_begin = self._last_end = 0.0
        self._begin_mark: Any = None
        self._stop_watching: Callable[[], str | None] | None = None
        self._gauge: Gauge | None = None
        self._read_at = 0.0
        self._joules: float | None = None
        self._compilations = 0
        self._steps: list[Step] = []
        self.warmup_s: float | None = None
        self.attention: str | None = None
        self.energy_source: str | None = None

    @property
    def most_steps(self) -> int:
        """Steps that there may be in all, the warm-up among them."""
        return self._warmup_steps + PATIENCE * self._measured_steps

    def step_begins(self) -> None:
        """Note the begin of a step."""
        if self._done == 0:
            self._on_first_step()
            self._first_begin = self._clock()
        if self._done == self._warmup_steps - 1:
            self._stop_watching = watch_attention()
        self._begin_mark = self._meter.mark()

    def step_ends(self) -> bool:
        """Note the end of a step; True when enough is measured."""
        issued = self._clock()
        end_mark = self._meter.mark()
        self._meter.synchronize()
        now = self._clock()
        self._done += 1
        if self._done > self._warmup_steps:
            self._note_step(issued, now, end_mark)
        elif self._done == self._warmup_steps:
            self._end_warmup(now)
        enough = self._is_enough()
        if enough and self._gauge is not None:
            self._gauge.stop()
        self._last_end = self._clock()
        return enough

    def _end_warmup(self, now: float) -> None:
        self.warmup_s = now - self._first_begin
        if self._stop_watching is not None:
            self.attention = self._stop_watching()
            self._stop_watching = None  # its events, some 100,000, go before anything is timed
        self._compilations = _compilations()
        self._gauge = self._meter.open_gauge()
        if self._gauge is not None:
            self.energy_source = self._gauge.source
        self._read_energy()

    def _note_step(self, issued: float, now: float, end_mark: Any) -> None:
        condition = self._meter.condition()  # first, before an idle device changes its clock
        before, read_before = self._joules, self._read_at
        self._read_energy()
        after = self._joules
        compilations, self._compilations = self._compilations, _compilations()
        self._steps.append(
            Step(
                wall_s=now - self._last_end,
                host_s=issued - self._last_end,
                device_s=self._meter.between_s(self._begin_mark, end_mark),
                span_s=self._read_at - read_before,
                joules=None if before is None or after is None else after - before,
                condition=condition,
                compiled=self._compilations != compilations,
            )
        )

    def _read_energy(self) -> None:
        self._joules = None if self._gauge is None else self._gauge.joules()
        self._read_at = self._clock()

    def _is_enough(self) -> bool:
        clean = [step.wall_s for step in self._steps if not step.compiled]
        if self._done >= self.most_steps:
            return True
        if sum(step.wall_s for step in self._steps) >= self._max_seconds:
            return len(clean) >= min(LEAST_MEASURED_STEPS, self._measured_steps)
        return len(clean) >= self._measured_steps and is_steady(clean) and not self._is_too_short

    @property
    def counted(self) -> tuple[Step, ...]:
        """The measured steps that compiled nothing; all of them if every one did."""
        clean = tuple(step for step in self._steps if not step.compiled)
        return clean or tuple(self._steps)

    @property
    def left_out(self) -> int:
        """Number of measured steps that do not count, because code was compiled in them."""
        return len(self._steps) - len(self.counted)

    @property
    def step_times_s(self) -> tuple[float, ...]:
        """Wall time of each step that counts."""
        return tuple(step.wall_s for step in self.counted)

    @property
    def device_times_s(self) -> tuple[float, ...]:
        """Device time of each step that counts; empty on a CPU."""
        return tuple(step.device_s for step in self.counted if step.device_s is not None)

    @property
    def host_times_s(self) -> tuple[float, ...]:
        """Host time of each step that counts."""
        return tuple(step.host_s for step in self.counted)

    @property
    def unstable(self) -> bool:
        """Whether the median is not to be trusted: the times vary too much, or all compiled."""
        return not is_steady(self.step_times_s) or any(step.compiled for step in self.counted)

    @property
    def _is_too_short(self) -> bool:
        """Whether the steps took too little time for the source of the energy."""
        if self.energy_source in (None, BOARD_POWER):
            return False
        return sum(step.span_s for step in self.counted) < LEAST_SPAN_S

    @property
    def power_w(self) -> float | None:
        """Mean power over the steps that count; None where they are too short to say."""
        joules = [step.joules for step in self.counted if step.joules is not None]
        if not joules or len(joules) < len(self.counted) or self._is_too_short:
            return None
        return sum(joules) / sum(step.span_s for step in self.counted)

    @property
    def joules(self) -> float | None:
        """Energy of the steps that count."""
        power = self.power_w
        return None if power is None else power * sum(self.step_times_s)

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """State of the device at the end of each step that counts, where it tells."""
        return tuple(step.condition for step in self.counted if step.condition is not None)


def is_steady(times_s: Sequence[float]) -> bool:
    """Whether the median of some times can be trusted; two times or fewer say nothing against it.

    The standard error of a median is 1.253 sigma / sqrt(n), for normal noise. Sigma is 1.483 times
    the median distance from the median, which one odd step does not move.
    """
    if len(times_s) < LEAST_MEASURED_STEPS:
        return True
    middle = statistics.median(times_s)
    sigma = 1.483 * statistics.median(abs(time - middle) for time in times_s)
    return bool(1.253 * sigma / len(times_s) ** 0.5 <= STEADY * middle)


def _compilations() -> int:
    """Return how often torch's compiler has run in this process; 0 where it is not loaded."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else int(dynamo.counters["frames"]["total"])
