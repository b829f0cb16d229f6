from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
from recorded import configure, h100_runs, trace_of
from scipy.stats import spearmanr

from lora_advisor.models.throughput import Observation, ThroughputModel
from lora_advisor.probes.cards import find_card
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.events import Work

#: What each timed run of an H100 took, and the work that a trace found in it.
RECORDED = json.loads((Path(__file__).parent / "recordings" / "h100_work.json").read_text("utf-8"))[
    "rows"
]

H100 = find_card("h100-80gb")


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


@pytest.mark.parametrize("number", [61, 66, 73])
def test_the_recorded_work_is_what_a_trace_finds_today(number: int) -> None:
    recorded = RECORDED[str(number)]
    assert h100_runs()[number]["measured"]["step_s"] == recorded["step_s"]

    work = trace_of(number).total_work()

    for name, amount in recorded["work"].items():
        assert getattr(work, name) == pytest.approx(amount, rel=0.01), name


def test_the_roofline_of_an_h100_ranks_its_steps(steps: list[Observation]) -> None:
    model = ThroughputModel.roofline(H100, "bf16")
    predicted = [model.step(o.config, o.work).value for o in steps]

    assert len(steps) == 27
    assert spearmanr(predicted, [o.step_s for o in steps]).statistic >= 0.8


def test_the_rooflines_interval_holds_the_recorded_steps(steps: list[Observation]) -> None:
    model = ThroughputModel.roofline(H100, "bf16")

    for o in steps:
        interval = model.step(o.config, o.work)
        assert interval.low <= o.step_s <= interval.high


@pytest.mark.parametrize("half", [0, 1])
def test_half_of_the_steps_tell_the_other_half(steps: list[Observation], half: int) -> None:
    model = ThroughputModel.fit(H100, steps[half::2])

    errors = [abs(model.step(o.config, o.work).value / o.step_s - 1) for o in steps[1 - half :: 2]]

    assert statistics.median(errors) <= 0.13
    assert model.probes == len(steps[half::2])


def made_up(count: int, *, noise: float = 0.0) -> list[Observation]:
    """Return steps of a device whose truth is known: 20 us a kernel, 200 TFLOP/s, 1 TB/s."""
    observations = []
    for n in range(count):
        work = Work(
            launches=2000,
            matmul_flops=5e12 * (1 + n % 5),
            attention_flops=1e11 * (1 + n % 3),
            bytes_moved=5e10 * (1 + n % 4),
        )
        device = work.matmul_flops / 200e12 + work.attention_flops / 200e12
        device += work.bytes_moved / 1e12
        step_s = max(2e-5 * work.launches, device) * math.exp(noise * (-1) ** n)
        observations.append(Observation(config=configure(), work=work, step_s=step_s))
    return observations


def test_intervals_hold_their_value() -> None:
    model = ThroughputModel.roofline(H100, "bf16")
    config = configure()
    work = made_up(1)[0].work

    step, speed = model.step(config, work), model.tokens_per_s(config, work)

    assert 0 < step.low < step.value < step.high
    assert 0 < speed.low < speed.value < speed.high
    assert speed.value == pytest.approx(config.tokens_per_step / step.value)


def test_more_probes_narrow_the_interval() -> None:
    spreads = [ThroughputModel.roofline(H100, "bf16").spread]
    spreads += [ThroughputModel.fit(H100, made_up(count)).spread for count in (2, 6, 20)]

    assert spreads == sorted(spreads, reverse=True)
    assert spreads[-1] < spreads[0] / 3


def test_scattered_probes_keep_the_interval_wide() -> None:
    quiet = ThroughputModel.fit(H100, made_up(20))
    noisy = ThroughputModel.fit(H100, made_up(20, noise=0.2))

    assert noisy.spread > quiet.spread
    assert noisy.spread > 0.2


def test_probes_find_the_device_behind_them() -> None:
    model = ThroughputModel.fit(find_card("rtx-4090"), made_up(20))

    for o in made_up(20):
        assert model.step(o.config, o.work).value == pytest.approx(o.step_s, rel=0.1)


def test_one_probe_is_enough_for_a_device_without_figures() -> None:
    probe = made_up(1)[0]

    model = ThroughputModel.fit(None, [probe])

    assert model.step(probe.config, probe.work).value == pytest.approx(probe.step_s, rel=0.1)
    assert model.spread > 0


def test_a_step_of_many_small_kernels_takes_what_the_host_takes() -> None:
    model = ThroughputModel.roofline(H100, "bf16")
    little = Work(launches=10_000, matmul_flops=1e9, attention_flops=0, bytes_moved=1e6)

    seconds = model.step(configure(), little).value
    twice = Work(launches=10_000, matmul_flops=2e9, attention_flops=0, bytes_moved=2e6)

    # The recorded machine: 0.45 to 0.5 s for steps of 9 to 10 thousand kernels.
    assert 0.4 < seconds < 0.55
    assert model.step(configure(), twice).value == seconds


def test_a_card_without_bf16_computes_it_at_its_fp32_rate() -> None:
    t4 = find_card("t4")
    work = Work(launches=0, matmul_flops=1e15, attention_flops=0, bytes_moved=0)

    bf16 = ThroughputModel.roofline(t4, "bf16").step(configure(), work).value
    fp16 = ThroughputModel.roofline(t4, "fp16").step(configure(), work).value

    # NVIDIA's data sheet: 65 TFLOP/s in fp16, 8.1 in fp32.
    assert bf16 / fp16 == pytest.approx(65 / 8.1, rel=0.02)
