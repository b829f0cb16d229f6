"""Energy of a board while it works: by its counter, else by its power, else by its power limit.

Each gauge gives joules that only grow; what a span took is the difference of two readings.

    counter      the board's own (Volta and later); it moves every 20 to 100 ms
    sampled      the power, asked for every 100 ms by a thread and summed by the trapezoidal rule
    board power  the power limit times the time: an upper bound that says no more than the time does

What the thread costs: it sleeps in C without Python's lock, and ctypes gives the lock back during
the question, so a step is stopped only while a few lines of Python run: some 0.1 ms at each
waking (seen at 500 a second on a CPU), 0.1 % of the time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import perf_counter
from typing import Protocol

from lora_advisor.probes import nvml

#: Shorter spans have no energy: 100 ms between two updates of a counter would be a fifth of it.
LEAST_SPAN_S = 0.5
#: Time between two questions for the power.
_PERIOD_S = 0.1

COUNTER, SAMPLED, BOARD_POWER = "counter", "sampled", "board power"


class Gauge(Protocol):
    """Where the energy comes from."""

    @property
    def source(self) -> str:
        """Return "counter", "sampled" or "board power"."""

    def joules(self) -> float | None:
        """Return the energy so far; only differences mean anything."""

    def stop(self) -> None:
        """End what runs in the background."""


class Counter:
    """The board's own counter."""

    source = COUNTER

    def joules(self) -> float | None:
        """Return the counter."""
        return nvml.energy_joules()

    def stop(self) -> None:
        """Do nothing."""


class Sampler:
    """A thread that asks for the power now and then; it runs until it is stopped."""

    source = SAMPLED

    def __init__(self, power_w: Callable[[], float | None], period_s: float = _PERIOD_S) -> None:
        """Ask for the first time, and start."""
        self._power_w = power_w
        self._period_s = period_s
        self._lock = threading.Lock()
        self._joules = 0.0
        self._last_w = power_w()
        self._last_time = perf_counter()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="power", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(self._period_s):
            self._sample()

    def _sample(self) -> None:
        power, now = self._power_w(), perf_counter()
        if power is None:
            return  # the next answer bridges the gap
        with self._lock:
            before = power if self._last_w is None else self._last_w
            self._joules += (before + power) / 2 * (now - self._last_time)
            self._last_w, self._last_time = power, now

    def joules(self) -> float | None:
        """Return the energy so far, the last power taken to hold until now."""
        with self._lock:
            if self._last_w is None:
                return None
            return self._joules + self._last_w * (perf_counter() - self._last_time)

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join()


class BoardPower:
    """A power that is taken to be drawn all the time."""

    source = BOARD_POWER

    def __init__(self, power_w: float) -> None:
        """Set the power."""
        self._power_w = power_w

    def joules(self) -> float:
        """Return the power times the time."""
        return self._power_w * perf_counter()

    def stop(self) -> None:
        """Do nothing."""


def open_gauge(joules_before: float | None, board_w: float | None) -> Gauge | None:
    """Return the best gauge that the device has; None if nothing is known of its power.

    Args:
        joules_before: The counter some seconds ago. One that has not moved since does not count.
        board_w: The board's power by its maker, for a driver that tells no limit.
    """
    now = nvml.energy_joules()
    if now is not None and joules_before is not None and now > joules_before:
        return Counter()
    for power_w in (nvml.instant_power_w, nvml.power_w):
        if power_w() is not None:
            return Sampler(power_w)
    limit_w = nvml.power_limit_w() or board_w
    return None if limit_w is None else BoardPower(limit_w)
