"""Time the steps of a trainer: warm-up apart, each measured step by three clocks.

    step:      ... end i-1 | load rows | begin i | forward, backward, optimizer | wait | end i
    wall                   |<------------------------------------------------------->|
    host                   |<------------------------------------------------->|
    device                             |<--------------------------------------->|

The device is waited for after every step, so that no step pays for another.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

from lora_advisor.probes.meter import Meter, watch_attention

#: Stop for time only once the median stands on this many steps.
LEAST_MEASURED_STEPS = 3


class Stopwatch:
    """The clocks of one run; `step_begins` and `step_ends` are called around each step.

    Attributes:
        step_times_s: Wall time of each measured step, from the end of the one before.
        device_times_s: Time between events on the device; empty on a CPU.
        host_times_s: Time until the host had issued the step. A trainer that reads a value back
            from the device within the step (TRL logs the accuracy) waits there, and that counts.
        warmup_s: Time from the first step's begin to the last warm-up step's end.
        attention: Attention kernel of the last warm-up step, the profiled one.
    """

    def __init__(
        self,
        meter: Meter,
        *,
        warmup_steps: int,
        measured_steps: int,
        max_seconds: float,
        on_first_step: Callable[[], None] = lambda: None,
    ) -> None:
        """Set how many steps there will be."""
        self._meter = meter
        self._warmup_steps = warmup_steps
        self._measured_steps = measured_steps
        self._max_seconds = max_seconds
        self._on_first_step = on_first_step
        self._done = 0
        self._first_begin = self._last_end = 0.0
        self._begin_mark: Any = None
        self._stop_watching: Callable[[], str | None] | None = None
        self._joules: list[float | None] = []
        self.step_times_s: list[float] = []
        self.device_times_s: list[float] = []
        self.host_times_s: list[float] = []
        self.warmup_s: float | None = None
        self.attention: str | None = None

    def step_begins(self) -> None:
        """Note the begin of a step."""
        if self._done == 0:
            self._on_first_step()
            self._first_begin = perf_counter()
        if self._done == self._warmup_steps - 1:
            self._stop_watching = watch_attention()
        self._begin_mark = self._meter.mark()

    def step_ends(self) -> bool:
        """Note the end of a step; True when enough is measured."""
        issued = perf_counter()
        end_mark = self._meter.mark()
        self._meter.synchronize()
        now = perf_counter()
        self._done += 1
        if self._done > self._warmup_steps:
            self.host_times_s.append(issued - self._last_end)
            self.step_times_s.append(now - self._last_end)
            device = self._meter.between_s(self._begin_mark, end_mark)
            if device is not None:
                self.device_times_s.append(device)
        elif self._done == self._warmup_steps:
            self._end_warmup(now)
        enough = self._is_enough()
        if enough:
            self._joules.append(self._meter.joules())
        self._last_end = perf_counter()
        return enough

    def _end_warmup(self, now: float) -> None:
        self.warmup_s = now - self._first_begin
        if self._stop_watching is not None:
            self.attention = self._stop_watching()
        self._joules.append(self._meter.joules())

    def _is_enough(self) -> bool:
        count = len(self.step_times_s)
        spent = sum(self.step_times_s) >= self._max_seconds
        return count >= self._measured_steps or (spent and count >= LEAST_MEASURED_STEPS)

    @property
    def joules(self) -> float | None:
        """Energy of the measured steps."""
        if len(self._joules) != 2:
            return None
        start, end = self._joules
        return None if start is None or end is None else end - start

    @property
    def power_w(self) -> float | None:
        """Mean power over the measured steps."""
        joules = self.joules
        return None if joules is None else joules / sum(self.step_times_s)
