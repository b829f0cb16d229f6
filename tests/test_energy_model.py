"""Energy from the time of a step: what a board draws is learnt, or bounded by its limit."""

from __future__ import annotations

import math

import pytest

from lora_advisor.models.energy import EnergyModel
from lora_advisor.models.throughput import NINE_OF_TEN, StepTime

WAITING_W, COMPUTING_W = 120.0, 400.0


def time_of(host: float, device: float, deviation: float = 0.0) -> StepTime:
    """Return a step of so many seconds on both sides."""
    return StepTime(
        host=math.log(host),
        host_deviation=deviation,
        device=math.log(device),
        device_deviation=deviation,
    )


def observed(host: float, device: float) -> tuple[StepTime, float, float]:
    """Return a step of a board that draws what is said above."""
    time = time_of(host, device)
    return time, time.value, WAITING_W * time.value + COMPUTING_W * min(device, time.value)


#: From steps that wait for the host to steps that compute all the time.
STEPS = [(1.0, 0.05), (0.5, 0.2), (0.3, 0.3), (0.2, 1.0), (0.05, 2.0)]


def test_probes_find_what_the_board_draws() -> None:
    model = EnergyModel.fit([observed(*step) for step in STEPS])

    assert model.source == "probed"
    assert model.waiting_w == pytest.approx(WAITING_W, rel=0.1)
    assert model.computing_w == pytest.approx(COMPUTING_W, rel=0.1)


def test_a_step_that_was_not_probed_is_told() -> None:
    model = EnergyModel.fit([observed(*step) for step in STEPS])
    time, _, joules = observed(0.4, 0.7)

    energy = model.joules(time)

    assert energy.value == pytest.approx(joules, rel=0.05)
    assert energy.low < joules < energy.high


@pytest.mark.parametrize("step", [STEPS[0], STEPS[-1]], ids=["waits", "computes"])
def test_one_probe_tells_its_own_energy(step: tuple[float, float]) -> None:
    time, seconds, joules = observed(*step)

    model = EnergyModel.fit([(time, seconds, joules)])

    assert model.joules(time).value == pytest.approx(joules, rel=0.1)
    assert model.waiting_w >= 0 and model.computing_w >= 0


@pytest.mark.parametrize("step", [STEPS[0], STEPS[-1]], ids=["waits", "computes"])
def test_one_probe_leaves_less_power_for_a_board_that_waits(step: tuple[float, float]) -> None:
    model = EnergyModel.fit([observed(*step)])
    waits, computes = time_of(1.0, 0.05), time_of(0.05, 1.0)

    share = model.joules(waits).value / model.joules(computes).value

    assert 0.2 < share / (waits.value / computes.value) < 0.5


def test_an_uncertain_time_has_an_uncertain_energy() -> None:
    model = EnergyModel.fit([observed(*step) for step in STEPS])

    sure, unsure = (model.joules(time_of(0.2, 1.0, deviation)) for deviation in (0.01, 0.3))

    assert unsure.value == sure.value
    assert unsure.low < sure.low < sure.value < sure.high < unsure.high


def test_without_probes_the_boards_limit_is_an_upper_bound() -> None:
    time = time_of(0.1, 1.0, 0.1)

    energy = EnergyModel.of_board(700.0).joules(time)

    assert energy.value == pytest.approx(700 * time.value)
    assert energy.high == pytest.approx(700 * time.quantile(NINE_OF_TEN))
    assert energy.low < 0.25 * energy.value  # a board that waits draws little
    assert EnergyModel.of_board(700.0).source == "board power"
