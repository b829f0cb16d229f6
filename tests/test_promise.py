"""What is measured next: the gain that is expected, the chance that it runs, and what it costs."""

from __future__ import annotations

import math

import numpy
import pytest
from foretold import ended, prediction
from recorded import configure

from lora_advisor.advisor.promise import Costs, Promise, chance_of, most_promising
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.machine import GIB


def promise(tokens_per_s: float, deviation: float, chance: float = 1.0) -> Promise:
    return Promise(tokens_per_s=tokens_per_s, deviation=deviation, chance=chance)


@pytest.mark.parametrize("tokens_per_s", [700, 1000, 1300])
@pytest.mark.parametrize("deviation", [0.02, 0.1, 0.5])
def test_the_expected_improvement_is_the_integral_that_it_solves(
    tokens_per_s: float, deviation: float
) -> None:
    best = 1000.0
    z = numpy.linspace(-10, 10, 200_001)
    density = numpy.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    gain = numpy.maximum(0.0, tokens_per_s * numpy.exp(deviation * z) / best - 1)
    integral = float(numpy.trapezoid(gain * density, z))

    improvement = promise(tokens_per_s, deviation, chance=0.6).improvement(best)

    assert improvement == pytest.approx(0.6 * integral, rel=1e-5, abs=1e-9)


def test_what_is_certain_improves_by_its_lead() -> None:
    assert promise(1100, 0.0).improvement(1000) == pytest.approx(0.1)
    assert promise(900, 0.0).improvement(1000) == 0.0


@pytest.mark.parametrize(
    ("tokens_per_s", "deviation", "chance", "may"),
    [
        (1010, 0.0, 1.0, False),  # by less than 2 %
        (1030, 0.0, 1.0, True),
        (1030, 0.0, 0.04, False),  # it hardly runs
        (900, 0.1, 1.0, True),  # 1020 is 1.25 deviations away: 1 in 9
        (900, 0.05, 1.0, False),  # 2.5 deviations: 1 in 160
        (900, 0.1, 0.4, False),  # 1 in 9, and then 4 in 10
    ],
)
def test_it_may_beat_the_best_where_one_time_in_twenty_it_does(
    tokens_per_s: float, deviation: float, chance: float, may: bool
) -> None:
    assert promise(tokens_per_s, deviation, chance).may_beat(1000) is may


# The chance that it runs -------------------------------------------------------------------------


def chance(needed_gib: float, *, reserved_gib: float = 7.0, **knobs: str) -> float:
    """Return the chance of an uncertain configuration under a cap of 7 GiB."""
    uncertain = prediction(
        verdict="uncertain",
        needed_bytes=int(needed_gib * GIB),
        reserved_bytes=int(reserved_gib * GIB),
    )
    return chance_of(configure(**knobs), uncertain, 7 * GIB)


def test_the_chance_to_run_falls_with_the_memory_needed() -> None:
    chances = [chance(needed) for needed in (6.5, 6.8, 7.0, 7.2, 7.5)]

    assert chances == sorted(chances, reverse=True)
    assert chances[0] > 0.95 and chances[-1] < 0.01
    assert chances[2] == pytest.approx(0.5, abs=0.02)


def test_a_verdict_decides_where_there_is_one() -> None:
    sure = {
        verdict: chance_of(configure(), prediction(verdict=verdict), 7 * GIB)
        for verdict in ("fits", "does not fit")
    }

    assert sure["fits"] > 0.9
    assert sure["does not fit"] == 0.0


def test_compiled_layers_are_less_certain_and_a_flushed_cache_is_a_risk() -> None:
    assert chance(7.2, compile="layers") > chance(7.2)
    assert chance(6.8, compile="layers") < chance(6.8)
    flushing = chance(6.8, reserved_gib=7.5)
    assert flushing == pytest.approx(chance(6.8) / 2)
    assert chance(6.8, reserved_gib=7.5, allocator="expandable_segments") == chance(6.8)


# What a probe costs ------------------------------------------------------------------------------

EAGER, COMPILED = configure(), configure(compile="layers")


def note(costs: Costs, config: RunConfig, *, wall_s: float, warmup_s: float = 2.0) -> None:
    """Note a probe of three steps of one second."""
    costs.note(ended(config, step_times_s=(1.0, 1.0, 1.0), warmup_s=warmup_s), wall_s)


def test_costs_are_learnt_from_the_probes_that_ran() -> None:
    costs = Costs()
    assert costs.expected_s(EAGER, 2.0, 5) == 8 + 5 * 2  # a guess
    assert costs.expected_s(EAGER, None, 5) == 8 + 5
    assert costs.expected_s(COMPILED, 2.0, 5) == 8 + 20 + 5 * 2

    note(costs, EAGER, wall_s=2 + 3 + 1.5)
    assert costs.expected_s(EAGER, 2.0, 5) == 1.5 + 5 * 2
    assert costs.expected_s(COMPILED, 2.0, 5) == 1.5 + 20 + 5 * 2

    # Of its 32 s of warm-up two were steps.
    note(costs, COMPILED, wall_s=32 + 3 + 1.5, warmup_s=32.0)
    assert costs.expected_s(COMPILED, 2.0, 5) == 1.5 + 30 + 5 * 2
    assert costs.expected_s(EAGER, 2.0, 5) == 1.5 + 5 * 2


def test_a_probe_that_failed_tells_nothing_of_costs() -> None:
    costs = Costs()

    costs.note(ended(EAGER, "failed"), 100.0)

    assert costs == Costs()


# The choice --------------------------------------------------------------------------------------


def test_the_largest_gain_for_each_second_is_measured_next() -> None:
    small, large = configure(micro_batch=1), configure(micro_batch=4)
    quick, slow = (small, promise(1100, 0.05), 10.0), (large, promise(1200, 0.05), 40.0)

    assert most_promising([quick, slow], 1000) == small
    assert most_promising([(small, promise(1100, 0.05), 30.0), slow], 1000) == large
    assert most_promising([quick, slow], 2000) is None
    assert most_promising([], 1000) is None
