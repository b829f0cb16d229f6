"""The stopwatch: which steps count, when it has enough, and what it says of the device.

A device with a clock of its own stands in for the GPU, so that every time is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from lora_advisor.probes.exchange import Answer
from lora_advisor.probes.meter import Condition, CpuMeter, Memory
from lora_advisor.probes.stopwatch import Stopwatch, is_steady
from lora_advisor.probes.worker import _timed

WARMUP = [9.0, 5.0]
#: How long the stand-in takes to say how it is, and what it draws then and while it works.
LOOK_S, IDLE_W, BUSY_W = 0.25, 100.0, 300.0


class Device:
    """A device whose steps take what is written down, and the gauge of its energy."""

    def __init__(
        self,
        steps: list[float],
        *,
        source: str | None = "counter",
        conditions: list[Condition] | None = None,
    ) -> None:
        self.time = 0.0
        self.energy = 0.0
        self.waits = iter([*WARMUP, *steps])
        self.conditions = iter(conditions or ())
        self.source = source or ""
        self.stopped = False
        self._has_gauge = source is not None

    def clock(self) -> float:
        return self.time

    def synchronize(self) -> None:
        seconds = next(self.waits)
        self.time += seconds
        self.energy += BUSY_W * seconds

    def mark(self) -> float:
        return self.time

    def between_s(self, start: float, end: float) -> float:
        return end - start

    def open_gauge(self) -> Device | None:
        return self if self._has_gauge else None

    def joules(self) -> float:
        return self.energy

    def stop(self) -> None:
        self.stopped = True

    def condition(self) -> Condition | None:
        self.time += LOOK_S
        self.energy += IDLE_W * LOOK_S
        return next(self.conditions, None)

    def sm_clock_max_mhz(self) -> int | None:
        return None

    def live_bytes(self) -> int | None:
        return None

    def memory(self) -> Memory:
        return Memory()


def measured(
    device: Device,
    *,
    measured_steps: int = 3,
    max_seconds: float = 100.0,
    before_step: Callable[[int], None] = lambda step: None,
) -> Stopwatch:
    """Return a stopwatch that has run until it had enough."""
    watch = Stopwatch(
        device,
        warmup_steps=2,
        measured_steps=measured_steps,
        max_seconds=max_seconds,
        clock=device.clock,
    )
    for step in range(watch.most_steps):
        watch.step_begins()
        before_step(step)
        if watch.step_ends():
            return watch
    raise AssertionError("the stopwatch goes on after the last step")


def test_warm_up_is_not_among_the_measured_steps() -> None:
    watch = measured(Device([2.0, 2.1, 2.0]))
    assert watch.step_times_s == pytest.approx((2.0, 2.1, 2.0))
    assert watch.warmup_s == 9.0 + 5.0
    assert not watch.unstable


def test_a_look_at_the_device_is_in_no_time() -> None:
    watch = measured(Device([2.0, 2.0, 2.0]))
    assert watch.step_times_s == (2.0, 2.0, 2.0)  # not 2.25
    assert watch.host_times_s == (0.0, 0.0, 0.0)  # all of a step is waiting


def test_a_cpu_has_neither_device_time_nor_energy() -> None:
    meter = CpuMeter()
    watch = Stopwatch(meter, warmup_steps=2, measured_steps=3, max_seconds=0.0)
    for _ in range(5):
        watch.step_begins()
        watch.step_ends()
    assert len(watch.step_times_s) == 3
    assert (watch.device_times_s, watch.conditions) == ((), ())
    assert (watch.joules, watch.power_w, watch.energy_source) == (None, None, None)


@pytest.mark.parametrize("wanted", [1, 2, 3, 6])
def test_as_many_steps_are_measured_as_asked_for(wanted: int) -> None:
    watch = measured(Device([2.0] * 12), measured_steps=wanted)
    assert len(watch.step_times_s) == wanted


def test_measuring_stops_for_time_after_three_steps() -> None:
    watch = measured(Device([2.0] * 9), measured_steps=9, max_seconds=3.0)
    assert len(watch.step_times_s) == 3


def test_times_that_vary_are_measured_on_until_the_median_is_steady() -> None:
    device = Device([2.0, 2.5, 1.6, 2.0, 2.0, 2.0])
    watch = measured(device)
    # Distances from the median: 0, 0.5, 0.4; then 0, 0.5, 0.4, 0; then 0, 0.5, 0.4, 0, 0.
    assert watch.step_times_s == pytest.approx((2.0, 2.5, 1.6, 2.0, 2.0))
    assert not watch.unstable


def test_times_that_go_on_to_vary_are_unstable_at_twice_the_steps() -> None:
    watch = measured(Device([1.0, 2.0, 3.0, 1.0, 2.0, 3.0, 1.0]))
    assert watch.step_times_s == pytest.approx((1.0, 2.0, 3.0, 1.0, 2.0, 3.0))
    assert watch.unstable


def test_times_that_vary_are_not_measured_beyond_the_time_limit() -> None:
    watch = measured(Device([1.0, 2.0, 3.0, 1.0]), max_seconds=6.0)
    assert len(watch.step_times_s) == 3
    assert watch.unstable


@pytest.mark.parametrize(
    ("times", "steady"),
    [
        ((1.0, 1.0, 1.0), True),
        ((1.0, 1.0, 9.0), True),  # one odd step does not move the median
        ((0.96, 1.0, 1.04), True),  # 1.253 x 1.483 x 0.04 / sqrt(3) = 0.043 of the median
        ((0.95, 1.0, 1.05), False),  # 0.054
        ((0.95, 1.0, 1.05) * 2, True),  # as wide, but six steps: 0.038
        ((1.0, 3.0), True),  # two times say nothing
        ((), True),
    ],
)
def test_a_median_is_steady_by_its_standard_error(times: tuple[float, ...], steady: bool) -> None:
    assert is_steady(times) is steady


def test_energy_is_that_of_the_steps_alone() -> None:
    device = Device([2.0, 2.0, 2.0])
    watch = measured(device)
    # Each span is a look at 100 W for 0.25 s and a step at 300 W for 2 s.
    assert watch.power_w == pytest.approx((25 + 600) / 2.25)
    assert watch.joules == pytest.approx((25 + 600) / 2.25 * 6)
    assert watch.energy_source == "counter"
    assert device.stopped


class QuickDevice(Device):
    """A device that answers at once."""

    def condition(self) -> Condition | None:
        return None


def test_steps_too_short_for_the_counter_are_measured_on() -> None:
    watch = measured(QuickDevice([0.13] * 6))
    assert len(watch.step_times_s) == 4  # 0.39 s is too little, 0.52 s is not
    assert watch.power_w == pytest.approx(BUSY_W)
    assert watch.joules == pytest.approx(BUSY_W * 0.52)


@pytest.mark.parametrize("source", ["counter", "sampled"])
def test_steps_that_stay_too_short_have_no_energy_but_a_source(source: str) -> None:
    watch = measured(QuickDevice([0.01] * 6, source=source))
    assert len(watch.step_times_s) == 6
    assert (watch.joules, watch.power_w, watch.energy_source) == (None, None, source)


def test_board_power_needs_no_time() -> None:
    watch = measured(QuickDevice([0.01] * 6, source="board power"))
    assert len(watch.step_times_s) == 3
    assert watch.power_w == pytest.approx(BUSY_W)


@pytest.fixture
def compiler() -> Iterator[Callable[[], None]]:
    """Return what has torch's compiler run once."""
    from torch._dynamo import config, reset

    reset()
    compiled = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    sizes = iter(range(2, 100))
    with config.patch(recompile_limit=100):
        yield lambda: compiled(torch.ones(next(sizes)))
    reset()


def test_a_step_that_compiles_does_not_count(compiler: Callable[[], None]) -> None:
    compiling = (0, 3)  # the first step of the warm-up, the second measured one
    watch = measured(
        Device([2.0, 7.0, 2.1, 2.0]),
        before_step=lambda step: compiler() if step in compiling else None,
    )
    assert watch.step_times_s == pytest.approx((2.0, 2.1, 2.0))
    assert watch.left_out == 1
    assert not watch.unstable
    assert watch.joules == pytest.approx((25 * 3 + 300 * 6.1) / (0.75 + 6.1) * 6.1)
    detail = _timed(Answer(outcome="ok"), watch).detail
    assert detail == "1 of 4 measured steps compiled code and do not count"


def test_steps_that_all_compile_count_but_are_not_trusted(compiler: Callable[[], None]) -> None:
    watch = measured(Device([2.0] * 6), before_step=lambda step: compiler())
    assert len(watch.step_times_s) == 6
    assert watch.left_out == 0
    assert watch.unstable


def test_only_the_last_warm_up_step_is_profiled() -> None:
    profiled: list[bool] = []
    heads = torch.ones(1, 2, 16, 8)

    def attend(step: int) -> None:
        torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
        profiled.append(torch._C._autograd._profiler_enabled())

    watch = measured(Device([2.0] * 3), before_step=attend)
    assert profiled == [False, True, False, False, False]
    assert watch.attention is not None


def test_what_the_device_said_is_summed_up() -> None:
    conditions = [
        Condition(sm_clock_mhz=1900, temperature_c=60, throttled=()),
        Condition(sm_clock_mhz=1500, temperature_c=71, throttled=("temperature", "power cap")),
        Condition(sm_clock_mhz=1700, throttled=("power cap",)),
    ]
    answer = _timed(Answer(outcome="ok"), measured(Device([2.0, 2.0, 2.0], conditions=conditions)))
    assert answer == Answer(
        outcome="ok",
        step_times_s=(2.0, 2.0, 2.0),
        device_times_s=answer.device_times_s,
        host_times_s=(0.0, 0.0, 0.0),
        warmup_s=14.0,
        joules=answer.joules,
        power_w=answer.power_w,
        energy_source="counter",
        sm_clock_mhz=1700,
        temperature_c=71,
        throttled=("power cap", "temperature"),
        unstable=False,
    )


def test_a_device_that_says_nothing_of_itself_is_unknown() -> None:
    answer = _timed(Answer(outcome="ok"), measured(Device([2.0] * 3, source=None)))
    unknown = (answer.sm_clock_mhz, answer.temperature_c, answer.throttled, answer.energy_source)
    assert unknown == (None, None, None, None)
    nothing = measured(Device([2.0] * 3, source=None, conditions=[Condition()] * 3))
    assert _timed(Answer(outcome="ok"), nothing) == answer
