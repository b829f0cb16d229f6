"""The loop over probes: what it may spend, what it believes, and what stops it."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from made_up_device import Device, plan_with, speed_of
from recorded import TINY
from traced_once import save_figures, share_traces

from lora_advisor.advisor.baseline import baseline_config
from lora_advisor.advisor.planning import _open
from lora_advisor.advisor.session import PROOF_STEPS, Session, run
from lora_advisor.probes import nvml
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import BusyError, StackError, UnavailableError, UsageError
from lora_advisor.probes.machine import GIB, detect_stack
from lora_advisor.probes.record import ProbeResult, read_records
from lora_advisor.probes.spec import Spec


@pytest.fixture(autouse=True)
def _shared_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    share_traces(monkeypatch)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    return Spec(
        model=save_figures(tmp_path / "tiny"),
        vram_bytes=4 * GIB,
        seq_len=2048,
        effective_batch=4,
        device="cpu",
        free_trials=0,
        # In fp32 a trace holds a card's attention without a fused kernel, which no CPU runs.
        fixed={"precision": "bf16"},
    )


def session_of(spec: Spec) -> Session:
    return _open(spec, Device(spec).architecture, lambda line: None, None, None)


# The budget --------------------------------------------------------------------------------------


def test_a_budget_too_short_for_one_probe_is_refused_with_what_it_would_need(
    spec: Spec, tmp_path: Path
) -> None:
    device = Device(spec)

    # A start of 8 s and five steps, of which nothing is known yet, of 1 s.
    with pytest.raises(UsageError, match=r"take 13 s here, but got 12 s; give --budget 39s or"):
        plan_with(device, tmp_path, probe_budget_s=12)

    assert device.asked == []


def test_the_probes_end_with_the_budget_and_the_proof_is_owed_all_the_same(
    spec: Spec, tmp_path: Path
) -> None:
    said: list[str] = []
    device = Device(spec)

    plan = plan_with(device, tmp_path, probe_budget_s=14, say=said.append)

    assert "what may gain more takes longer than is left of 14 s" in said
    # Only the baseline was within the budget, so it is what is proved.
    assert [steps for _, _, steps in device.asked] == [3, PROOF_STEPS]
    assert plan.chosen.config == baseline_config(spec, "bf16")
    assert plan.chosen.evidence == "proved"


class Tiring(Device):
    """Runs at half its speed where it is measured at length, and moves a clock on."""

    seconds = 0.0
    first_proof_ended: float | None = None

    def answer(self, config: RunConfig, layers: int | None, steps: int) -> ProbeResult:
        """Return what comes of a configuration."""
        result = super().answer(config, layers, steps)
        slow = 2 if steps == PROOF_STEPS else 1
        times = tuple(slow * step_s for step_s in result.step_times_s)
        self.seconds += 8 + sum(times)
        if steps == PROOF_STEPS and self.first_proof_ended is None:
            self.first_proof_ended = self.seconds
        return dataclasses.replace(result, step_times_s=times)


def test_what_turns_out_slower_is_followed_by_the_next_while_the_budget_lasts(
    spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def proofs(folder: str, budget_s: float) -> tuple[Tiring, list[RunConfig]]:
        device = Tiring(spec)
        clock = SimpleNamespace(monotonic=lambda: device.seconds)
        monkeypatch.setattr("lora_advisor.advisor.session.time", clock)
        (tmp_path / folder).mkdir()
        plan = plan_with(device, tmp_path / folder, probe_budget_s=budget_s)
        found = [config for config, _, steps in device.asked if steps == PROOF_STEPS]
        assert plan.chosen.config in found and plan.chosen.evidence == "proved"
        return device, found

    ample, several = proofs("ample", 1e6)
    assert ample.first_proof_ended is not None
    short, one = proofs("short", ample.first_proof_ended + 1)

    assert len(several) > 1
    assert len(set(short.probed)) > 1  # there was something to go on to
    assert len(one) == 1


def test_with_ample_budget_the_loop_ends_where_nothing_gains(spec: Spec, tmp_path: Path) -> None:
    said: list[str] = []

    plan_with(Device(spec), tmp_path, probe_budget_s=1e6, say=said.append)

    assert "no configuration left can be expected to gain 2 %" in said


@pytest.fixture
def deep(spec: Spec, tmp_path: Path) -> Spec:
    """The same of a model with 16 layers."""
    folder = tmp_path / "deep"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**TINY, "num_hidden_layers": 16}))
    fixed = {**spec.fixed, "optimizer": "adamw_torch_fused"}
    return dataclasses.replace(spec, model=str(folder), fixed=fixed, probe_budget_s=1e6)


def test_long_probes_run_on_few_layers_and_the_proof_on_all(deep: Spec, tmp_path: Path) -> None:
    device = Device(deep, speed=lambda config: speed_of(config) / 10)

    plan = plan_with(device, tmp_path)

    first, *others, proof = device.asked
    assert first[1] is None  # nothing was known of its time
    assert {layers for _, layers, _ in others} == {4}
    assert proof == (plan.chosen.config, None, PROOF_STEPS)
    assert device.speed(plan.chosen.config) >= device.fastest(deep) / 1.02


def test_a_probe_of_few_layers_teaches_the_time_of_all(deep: Spec) -> None:
    device, config = Device(deep), baseline_config(deep, "bf16")
    part, whole = device.answer(config, 4, 3), device.answer(config, None, 3)
    assert part.step_s is not None and whole.step_s is not None and part.step_s < whole.step_s / 3
    predictor = session_of(deep).predictor

    told = predictor.learn([part]).predict(config).step_s

    assert told is not None
    assert told.value == pytest.approx(whole.step_s, rel=0.1)
    assert predictor.learn([part]).result_of(config) is None  # it is no measurement of the whole


# What is believed --------------------------------------------------------------------------------


def test_a_doubtful_probe_is_repeated_once(spec: Spec, tmp_path: Path) -> None:
    said: list[str] = []
    device = Device(spec, unstable=lambda config: config.method == "lora")

    plan = plan_with(device, tmp_path, say=said.append)

    baseline = device.asked[0]
    for asked, times in Counter(device.asked[1:]).items():
        assert times == (2 if asked[0].method == "lora" else 1)
    assert baseline[0].trainer == "transformers"
    assert "measured again: the step times vary" in said
    # Two measurements of one configuration are one probe.
    assert plan.probes == len(set(device.asked))


def test_the_repeat_of_a_doubtful_probe_is_what_counts(spec: Spec, tmp_path: Path) -> None:
    seen: set[RunConfig] = set()

    def first_time(config: RunConfig) -> bool:
        known = config in seen
        seen.add(config)
        return not known and config.trainer == "trl"

    class Slow(Device):
        def answer(self, config: RunConfig, layers: int | None, steps: int) -> ProbeResult:
            result = super().answer(config, layers, steps)
            if not result.unstable:
                return result
            slow = tuple(3 * seconds for seconds in result.step_times_s)
            return dataclasses.replace(result, step_times_s=slow)

    device = Slow(spec, unstable=first_time)

    plan = plan_with(device, tmp_path)

    assert speed_of(plan.chosen.config) >= device.fastest(spec) / 1.02
    assert plan.chosen.tokens_per_s == pytest.approx(speed_of(plan.chosen.config))


def test_a_baseline_that_is_fastest_is_the_plan(spec: Spec, tmp_path: Path) -> None:
    def speed(config: RunConfig) -> float:
        return speed_of(config) * (5.0 if config.trainer == "transformers" else 1.0)

    plan = plan_with(Device(spec, speed=speed), tmp_path)

    assert plan.chosen.config == baseline_config(spec, "bf16")
    assert plan.chosen.evidence == "proved"


def test_a_baseline_that_is_not_as_the_user_fixed_it_cannot_win(spec: Spec, tmp_path: Path) -> None:
    def speed(config: RunConfig) -> float:
        return speed_of(config) * (5.0 if config.trainer == "transformers" else 1.0)

    plan = plan_with(Device(spec, speed=speed), tmp_path, fixed={**spec.fixed, "method": "lora"})

    assert (plan.chosen.config.method, plan.chosen.config.trainer) == ("lora", "trl")
    assert plan.baseline is not None
    assert (plan.baseline.tokens_per_s or 0) > (plan.chosen.tokens_per_s or 0)


# What stops it -----------------------------------------------------------------------------------


def test_a_gpu_taken_in_the_middle_keeps_what_was_measured(spec: Spec, tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    device = Device(spec, record=record, busy_after=2)

    with pytest.raises(BusyError, match=r"must be free .* The 2 probes so far are kept; the same"):
        plan_with(device, tmp_path)

    assert [result.config for result in read_records(record)] == device.probed
    again = Device(spec, record=record)
    plan = plan_with(again, tmp_path)
    assert plan.reused == 2
    assert not set(device.asked) & set(again.asked)


def test_a_gpu_that_is_gone_ends_the_plan(
    spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_of(spec)
    session.spec = dataclasses.replace(spec, device="cuda")
    device = Device(spec)
    session.probe = lambda *asked: dataclasses.replace(device(*asked), outcome="failed")
    config = baseline_config(spec, "bf16")

    monkeypatch.setattr(nvml, "device_count", lambda: 1)
    assert run(session, config, "proof").outcome == "failed"
    monkeypatch.setattr(nvml, "device_count", lambda: 0)
    with pytest.raises(UnavailableError, match=r"shows none any more; .* The 1 probes so far"):
        run(session, config.replace(seq_len=1024), "proof")


@pytest.fixture
def elsewhere(spec: Spec, tmp_path: Path) -> Path:
    """A record whose probes are of another torch."""
    device = Device(spec, record=tmp_path / "record.jsonl")
    device.stack = dataclasses.replace(detect_stack(), torch="1.0")
    device(baseline_config(spec, "bf16"), None, 3)
    return tmp_path


def test_a_record_of_another_stack_that_the_user_named_is_refused(
    spec: Spec, elsewhere: Path
) -> None:
    device = Device(spec)

    with pytest.raises(StackError, match=r"torch 1\.0 there, \d.* here\); name another record"):
        plan_with(device, elsewhere, own_record=True)

    assert device.asked == []


@pytest.mark.parametrize("option", [{}, {"own_record": True, "fresh": True}])
def test_a_record_of_another_stack_is_passed_over_otherwise(
    spec: Spec, elsewhere: Path, option: dict[str, bool]
) -> None:
    assert plan_with(Device(spec), elsewhere, **option).reused == 0


def test_a_named_record_with_probes_of_here_among_others_is_used(
    spec: Spec, elsewhere: Path
) -> None:
    Device(spec, record=elsewhere / "record.jsonl")(baseline_config(spec, "bf16"), None, 3)

    assert plan_with(Device(spec), elsewhere, own_record=True).reused == 1
