from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from recorded import configure, h100_runs, trace_of
from scipy.stats import spearmanr

from lora_advisor.models.residuals import Residuals
from lora_advisor.models.throughput import Observation, StepTime, ThroughputModel
from lora_advisor.probes.cards import find_card
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.events import Work

#: What each timed run of an H100 took, and the work that a trace found in it.
RECORDED = json.loads((Path(__file__).parent / "recordings" / "h100_work.json").read_text("utf-8"))[
    "rows"
]

H100, T4 = find_card("h100-80gb"), find_card("t4")


@pytest.fixture(scope="module")
def steps() -> list[Observation]:
    return [
        Observation(
            config=RunConfig.from_json(row["config"]),
            work=Work(**row["work"]),
            step_s=row["step_s"],
        )
        for row in RECORDED.values()
    ]


def time_of(model: ThroughputModel, step: Observation) -> StepTime:
    return model.time(step.config, step.work)


def error(model: ThroughputModel, step: Observation) -> float:
    """Return by how much, in log time, a model is off."""
    return abs(math.log(time_of(model, step).value / step.step_s))


# Recorded steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [61, 66, 73, 85])
def test_the_recorded_work_is_what_a_trace_finds_today(number: int) -> None:
    recorded = RECORDED[str(number)]
    assert h100_runs()[number]["measured"]["step_s"] == recorded["step_s"]

    work = trace_of(number).total_work()

    for name, amount in recorded["work"].items():
        assert getattr(work, name) == pytest.approx(amount, rel=0.01), name


def test_the_roofline_of_an_h100_ranks_its_steps(steps: list[Observation]) -> None:
    model = ThroughputModel.roofline(H100)

    predicted = [o.config.tokens_per_step / time_of(model, o).value for o in steps]
    measured = [o.config.tokens_per_step / o.step_s for o in steps]

    assert len(steps) == 27
    assert spearmanr(predicted, measured).statistic >= 0.9


def test_the_rooflines_interval_holds_the_recorded_steps(steps: list[Observation]) -> None:
    model = ThroughputModel.roofline(H100)

    for o in steps:
        interval = time_of(model, o).interval
        assert interval.low <= o.step_s <= interval.high


@pytest.mark.parametrize("half", [0, 1])
def test_half_of_the_steps_tell_the_other_half(steps: list[Observation], half: int) -> None:
    model, others = ThroughputModel.fit(H100, steps[half::2]), steps[1 - half :: 2]
    roofline = ThroughputModel.roofline(H100)

    errors = [error(model, o) for o in others]

    assert model.probes == len(steps[half::2])
    assert statistics.median(errors) <= 0.065
    assert max(errors) <= 0.22
    assert statistics.median(errors) <= statistics.median(error(roofline, o) for o in others) / 2
    intervals = [time_of(model, o).interval for o in others]
    within = [i.low <= o.step_s <= i.high for i, o in zip(intervals, others, strict=True)]
    assert sum(within) >= 0.75 * len(others)


# A device whose truth is known -------------------------------------------------------------------

#: Seconds a launch by Python and by the engine, and of a micro-batch; FLOP/s and bytes a second.
LAUNCH_S, ENGINE_S, BATCH_S = 4e-5, 2.5e-5, 0.015
PRODUCTS, ATTENTION, BANDWIDTH = 100e12, 30e12, 0.7e12


def made_up(config: RunConfig, work: Work, stray: float = 0.0) -> Observation:
    """Return a step of the made-up device."""
    host = BATCH_S + LAUNCH_S * work.launches + ENGINE_S * work.engine_launches
    device = (
        work.matmul_flops / PRODUCTS
        + work.attention_flops / ATTENTION
        + work.bytes_moved / BANDWIDTH
    )
    return Observation(config=config, work=work, step_s=math.hypot(host, device) * math.exp(stray))


def work_of(n: int, *, device: float) -> Work:
    """Return the nth of several works that differ in their terms; `device` scales its part."""
    return Work(
        launches=1000 * (1 + n % 3),
        engine_launches=500 * (1 + n % 2),
        matmul_flops=device * 1e13 * (1 + n % 5),
        attention_flops=device * 1e12 * (1 + n % 4),
        bytes_moved=device * 1e11 * (1 + n % 7),
    )


#: How much the device has to do where it, and where the host, takes most of the time.
BOUND = {"device": 2.0, "host": 0.02}


def several(bound: str, *, count: int = 20, stray: float = 0.0) -> list[Observation]:
    """Return steps of one arm that stray up and down in turn."""
    return [
        made_up(
            configure(micro_batch=1 + n % 4),
            work_of(n, device=BOUND[bound]),
            stray * (-1) ** (n // 4),
        )
        for n in range(count)
    ]


def test_probes_find_the_device_behind_them() -> None:
    probes = several("device") + several("host")
    model = ThroughputModel.fit(find_card("rtx-4090"), probes[::2])

    for unseen in probes[1::2]:
        assert error(model, unseen) < 0.05
        host_bound = unseen.work.matmul_flops < 1e13
        assert time_of(model, unseen).is_host_bound == host_bound


@pytest.mark.parametrize("bound", BOUND)
def test_probes_that_disagree_widen_the_deviation(bound: str) -> None:
    unseen = made_up(configure(micro_batch=3), work_of(3, device=BOUND[bound]))

    deviations = [
        time_of(ThroughputModel.fit(H100, several(bound, stray=stray)), unseen).deviation
        for stray in (0.0, 0.1, 0.3)
    ]

    assert deviations == sorted(deviations)
    assert deviations[-1] > 1.5 * deviations[0]


def test_more_probes_narrow_the_deviation() -> None:
    unseen = made_up(configure(micro_batch=3), work_of(3, device=1))
    models = [ThroughputModel.roofline(H100)]
    models += [ThroughputModel.fit(H100, several("device", count=n)) for n in (1, 4, 20)]

    deviations = [time_of(model, unseen).deviation for model in models]

    assert deviations == sorted(deviations, reverse=True)
    assert deviations[-1] < deviations[0] / 5


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "qlora"},
        {"kernels": "liger"},
        {"checkpointing": "off"},
        {"compile": "layers"},
        {"micro_batch": 64},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_an_arm_that_was_not_probed_is_wider(changes: dict[str, Any]) -> None:
    probes = several("device")
    model = ThroughputModel.fit(H100, probes)

    probed = time_of(model, probes[0])
    unprobed = model.time(configure(**changes), probes[0].work)

    assert unprobed.deviation > 1.5 * probed.deviation


def test_one_probe_is_enough_for_a_device_without_figures() -> None:
    probe = several("device", count=1)[0]

    model = ThroughputModel.fit(None, [probe])

    assert error(model, probe) < 0.1
    assert time_of(model, probe).deviation > 0


# What probes leave unexplained -------------------------------------------------------------------


def test_what_is_unexplained_of_one_side_tells_nothing_of_the_other() -> None:
    base = ThroughputModel.roofline(H100)
    config = configure()
    for side in (0, 1):
        sides = [Residuals.fit([], noise=0.01), Residuals.fit([], noise=0.01)]
        sides[side] = Residuals.fit([(config, 0.2)] * 3, noise=0.01)
        model = ThroughputModel(base.host, base.device, left=(sides[0], sides[1]))
        without = base.time(config, work_of(0, device=1))

        time = model.time(config, work_of(0, device=1))

        shifts = (time.host - without.host, time.device - without.device)
        assert shifts[side] == pytest.approx(0.2, abs=0.02)
        assert shifts[1 - side] == 0.0
        narrowed = (time.host_deviation, time.device_deviation)
        prior = (without.host_deviation, without.device_deviation)
        assert narrowed[side] < 0.1 * prior[side]
        assert narrowed[1 - side] == prior[1 - side]


def test_probes_that_wait_for_the_host_teach_the_hosts_side_only() -> None:
    host = ThroughputModel.fit(H100, several("host")).left
    device = ThroughputModel.fit(H100, several("device")).left

    assert host is not None and device is not None
    assert [side.count for side in host] == [20, 0]
    assert [side.count for side in device] == [0, 20]


def test_residuals_fade_with_what_differs() -> None:
    seen, other = configure(), configure(method="qlora", attention="eager", checkpointing="off")
    residuals = Residuals.fit([(seen, 0.2)], noise=0.01)

    near, _ = residuals.at(seen.replace(allocator="expandable_segments"))
    far, deviation = residuals.at(other)

    assert residuals.at(seen)[0] == pytest.approx(0.2, rel=0.05)
    assert near == pytest.approx(0.2, rel=0.05)
    assert 0 < far < 0.05
    assert deviation > 5 * residuals.at(seen)[1]


# Host, device, precision -------------------------------------------------------------------------


def test_intervals_hold_their_value() -> None:
    time = time_of(ThroughputModel.roofline(H100), several("device", count=1)[0])

    assert time.interval.low < time.value < time.interval.high
    assert time.quantile(-1) < time.quantile(0) == time.value < time.quantile(1)
    assert math.log(time.quantile(1) / time.value) == pytest.approx(time.deviation)


def test_a_step_of_many_small_kernels_takes_what_the_host_takes() -> None:
    model = ThroughputModel.roofline(H100)
    little = Work(launches=10_000, matmul_flops=1e9, bytes_moved=1e6)

    time = model.time(configure(), little)

    assert time.is_host_bound
    assert model.time(configure(), little.times(1)).value == time.value
    more_to_compute = Work(launches=10_000, matmul_flops=1e11, bytes_moved=1e8)
    assert model.time(configure(), more_to_compute).value == pytest.approx(time.value, rel=0.01)
    # A usual host: 0.14 s for 10 thousand launches by Python.
    assert time.value == pytest.approx(0.0047 + 10_000 * 1.4e-5, rel=0.05)


def test_who_launches_decides_what_the_host_pays() -> None:
    model = ThroughputModel.roofline(H100)

    def seconds(**launches: float) -> float:
        return math.exp(model.time(configure(), Work(**launches)).host)

    by_engine, compiled = seconds(engine_launches=1e4), seconds(compiled_launches=1e4)
    by_python, custom = seconds(launches=1e4), seconds(custom_launches=1e4)
    called, hooks = seconds(compiled_custom_launches=1e4), seconds(hooks=1e4)

    assert by_engine < compiled < by_python < called < custom
    assert seconds() < hooks < by_python


def test_each_micro_batch_costs_the_host_its_share() -> None:
    model, work = ThroughputModel.roofline(H100), Work(launches=10)

    one, nine = (model.time(configure(accumulation=n), work.times(n)).value for n in (1, 9))

    assert nine == pytest.approx(9 * one, rel=0.02)


def device_seconds(model: ThroughputModel, precision: str, **work: float) -> float:
    return math.exp(model.time(configure(precision=precision), Work(**work)).device)


def test_a_card_without_bf16_computes_it_at_its_fp32_rate() -> None:
    model = ThroughputModel.roofline(T4)

    bf16, fp16 = (device_seconds(model, p, matmul_flops=1e15) for p in ("bf16", "fp16"))

    # NVIDIA's data sheet: 65 TFLOP/s in fp16, 8.1 in fp32.
    assert bf16 / fp16 == pytest.approx(65 / 8.1, rel=0.02)


@pytest.mark.parametrize("term", ["matmul_flops", "attention_flops"])
def test_work_in_32_bits_is_charged_at_the_cards_fp32_rate(term: str) -> None:
    model = ThroughputModel.roofline(H100)

    half = device_seconds(model, "bf16", **{term: 1e15})
    full = device_seconds(model, "bf16", **{f"fp32_{term}": 1e15})

    assert H100.bf16_tflops is not None
    slower = H100.bf16_tflops / H100.fp32_tflops
    assert full > 0.6 * slower * half
    # What is counted in 32 bits already is not slowed down once more by the precision.
    assert device_seconds(model, "fp32", **{f"fp32_{term}": 1e15}) == full


def test_memory_efficient_attention_takes_longer_than_flash() -> None:
    model = ThroughputModel.roofline(H100)

    flash = device_seconds(model, "bf16", attention_flops=1e15)
    assert device_seconds(model, "bf16", efficient_attention_flops=1e15) > flash
