"""Where the energy comes from: the best that the driver has, and never silence taken for zero.

A stand-in for the module `pynvml` answers, in the units of nvml.h; no GPU is needed.
"""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from lora_advisor.probes import energy, nvml
from lora_advisor.probes.energy import BoardPower, Counter, Gauge, Sampler, open_gauge

BOARD_W = 115.0


class Driver:
    """Answers what it was given; all else is not supported."""

    NVML_SUCCESS = 0
    NVML_FI_DEV_POWER_INSTANT = 186

    class NVMLError(Exception):
        """What pynvml raises."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802 - NVML's name
        return index

    def nvmlDeviceGetFieldValues(self, card: int, fields: list[int]) -> list[Any]:  # noqa: N802
        assert fields == [self.NVML_FI_DEV_POWER_INSTANT]
        milliwatts = self.answers.get("instant")
        status = 3 if milliwatts is None else self.NVML_SUCCESS  # 3: NVML_ERROR_NOT_SUPPORTED
        return [SimpleNamespace(nvmlReturn=status, value=SimpleNamespace(uiVal=milliwatts or 0))]

    def __getattr__(self, name: str) -> Any:
        short = {
            "nvmlDeviceGetTotalEnergyConsumption": "energy",
            "nvmlDeviceGetPowerUsage": "power",
            "nvmlDeviceGetEnforcedPowerLimit": "limit",
        }

        def answer(card: int) -> Any:
            if short[name] not in self.answers:
                raise self.NVMLError("not supported")
            return self.answers[short[name]]

        return answer


def gauge_of(
    monkeypatch: pytest.MonkeyPatch, *, before: float | None = None, **answers: Any
) -> Gauge | None:
    """Return the gauge of a card whose driver gives these answers."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(nvml, "_library", lambda: Driver(**answers))
    gauge = open_gauge(before, BOARD_W)
    if gauge is not None:
        gauge.stop()
    return gauge


def test_a_counter_that_moves_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    gauge = gauge_of(monkeypatch, before=12.0, energy=12_500, power=99_500)
    assert isinstance(gauge, Counter)
    assert gauge.source == "counter"
    assert gauge.joules() == 12.5  # of 12,500 mJ


@pytest.mark.parametrize("before", [12.5, None])
def test_a_counter_that_stands_still_is_none(
    monkeypatch: pytest.MonkeyPatch, before: float | None
) -> None:
    gauge = gauge_of(monkeypatch, before=before, energy=12_500, power=99_500)
    assert gauge is not None
    assert gauge.source == "sampled"


@pytest.mark.parametrize(
    ("answers", "watts"),
    [
        ({"power": 99_500}, 99.5),
        ({"power": 99_500, "instant": 104_000}, 104.0),  # now, not the mean of a second
        ({"instant": 104_000}, 104.0),
    ],
)
def test_without_a_counter_the_power_is_sampled(
    monkeypatch: pytest.MonkeyPatch, answers: dict[str, int], watts: float
) -> None:
    gauge = gauge_of(monkeypatch, **answers)
    assert isinstance(gauge, Sampler)
    assert power_of(monkeypatch, gauge) == pytest.approx(watts)


@pytest.mark.parametrize(("answers", "watts"), [({"limit": 80_000}, 80.0), ({}, BOARD_W)])
def test_without_power_the_limit_stands_for_it(
    monkeypatch: pytest.MonkeyPatch, answers: dict[str, int], watts: float
) -> None:
    gauge = gauge_of(monkeypatch, **answers)
    assert isinstance(gauge, BoardPower)
    assert gauge.source == "board power"
    assert power_of(monkeypatch, gauge) == pytest.approx(watts)


def test_a_board_of_which_nothing_is_known_has_no_gauge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "_library", lambda: None)
    assert open_gauge(None, None) is None


def power_of(monkeypatch: pytest.MonkeyPatch, gauge: Gauge) -> float:
    """Return the power that a stopped gauge takes to hold on."""
    monkeypatch.setattr(energy, "perf_counter", lambda: 1000.0)
    before = gauge.joules()
    monkeypatch.setattr(energy, "perf_counter", lambda: 1010.0)
    after = gauge.joules()
    assert before is not None
    assert after is not None
    return (after - before) / 10


def sampled(monkeypatch: pytest.MonkeyPatch, answers: list[float | None]) -> float | None:
    """Return the energy by answers that come a second apart."""
    now = [0.0]
    left = iter(answers)
    done = threading.Event()

    def power_w() -> float | None:
        for answer in left:
            now[0] += 1.0
            return answer
        done.set()
        return None

    monkeypatch.setattr(energy, "perf_counter", lambda: now[0])
    sampler = Sampler(power_w, period_s=0.001)
    assert done.wait(10)
    sampler.stop()
    return sampler.joules()


def test_samples_are_summed_by_the_trapezoidal_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    # 150 J in the first second, 250 J in the next.
    assert sampled(monkeypatch, [100.0, 200.0, 300.0]) == 400.0


def test_a_missing_answer_is_bridged_and_not_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sampled(monkeypatch, [100.0, None, 300.0]) == 400.0
    assert sampled(monkeypatch, [None, 100.0]) == 100.0
    assert sampled(monkeypatch, [100.0, 100.0, None]) == 200.0  # the last is taken to hold on


def test_a_sampler_that_never_had_an_answer_has_none() -> None:
    sampler = Sampler(lambda: None, period_s=0.001)
    assert sampler.joules() is None
    sampler.stop()


def test_a_stopped_sampler_leaves_no_thread() -> None:
    before = threading.active_count()
    sampler = Sampler(lambda: 100.0, period_s=0.001)
    assert threading.active_count() == before + 1
    sampler.stop()
    assert threading.active_count() == before
