from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_up_device import CHECKPOINTING, METHOD, Device, plan_with, speed_of
from traced_once import save_figures, share_traces

from lora_advisor.advisor.planning import NothingFitsError
from lora_advisor.advisor.session import PROOF_STEPS
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import AdvisorError, DataError, MissingInputError, OutputError
from lora_advisor.probes.machine import GIB
from lora_advisor.probes.plan import Plan, read_plan, write_plan
from lora_advisor.probes.spec import Spec

BATCH = 4


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
        effective_batch=BATCH,
        device="cpu",
        # In fp32 a trace holds a card's attention without a fused kernel, which no CPU runs.
        fixed={"precision": "bf16"},
    )


def test_the_fastest_configuration_is_chosen_and_has_run(spec: Spec, tmp_path: Path) -> None:
    device = Device(spec)

    plan = plan_with(device, tmp_path)

    assert speed_of(plan.chosen.config) >= device.fastest(spec) / 1.02
    assert (plan.chosen.config, None, PROOF_STEPS) in device.asked
    assert plan.chosen.evidence == "proved"
    assert plan.chosen.config.tokens_per_step == BATCH * 2048
    assert plan.probes == len(device.asked)
    assert len(device.asked) == len(set(device.asked))


@pytest.mark.parametrize(
    "twist", ["qlora is faster", "checkpointing is free", "small micro-batches are faster"]
)
def test_a_device_that_contradicts_the_models_is_believed(
    spec: Spec, tmp_path: Path, twist: str
) -> None:
    def speed(config: RunConfig) -> float:
        if twist == "qlora is faster":
            return speed_of(config) * (1.6 if config.method == "qlora" else 1.0)
        if twist == "checkpointing is free":
            gain = {"full": 1.5, "every_2": 1.3, "every_4": 1.15, "off": 1.0}
            return speed_of(config) * gain[config.checkpointing]
        return speed_of(config) * (1.6 if config.micro_batch == 1 else 1.0)

    device = Device(spec, speed=speed)

    plan = plan_with(device, tmp_path)

    assert speed(plan.chosen.config) >= device.fastest(spec) / 1.02


def test_the_plan_is_no_slower_than_the_baseline(spec: Spec, tmp_path: Path) -> None:
    device = Device(spec)

    plan = plan_with(device, tmp_path)

    assert plan.baseline is not None and plan.baseline.measured is not None
    assert (plan.chosen.tokens_per_s or 0) >= (plan.baseline.tokens_per_s or 0)
    assert plan.baseline.config.trainer == "transformers"


def test_what_runs_out_of_memory_is_left_for_the_next_best(spec: Spec, tmp_path: Path) -> None:
    def too_large(config: RunConfig) -> bool:
        return config.method == "lora" and config.micro_batch == 4

    def speed(config: RunConfig) -> float:
        return METHOD[config.method] * CHECKPOINTING[config.checkpointing]

    device = Device(spec, speed=speed, too_large=too_large)

    plan = plan_with(device, tmp_path)

    # The search had left the smaller micro-batch out, for the larger one was expected to fit.
    assert (plan.chosen.config.method, plan.chosen.config.micro_batch) == ("lora", 2)
    assert speed(plan.chosen.config) >= device.fastest(spec) / 1.02
    lost = [c for c in plan.rejected if c.measured is not None]
    # Every arm of LoRA that was tried, and each says so.
    assert {c.reason for c in lost if c.config.method == "lora"} == {"ran: out of memory"}


def test_an_arm_that_runs_out_of_memory_is_left_for_another(spec: Spec, tmp_path: Path) -> None:
    def too_large(config: RunConfig) -> bool:
        return config.method == "lora" and config.checkpointing == "off"

    device = Device(spec, too_large=too_large)

    plan = plan_with(device, tmp_path)

    assert not too_large(plan.chosen.config)
    assert speed_of(plan.chosen.config) >= device.fastest(spec) / 1.02
    lost = [c for c in plan.rejected if c.measured is not None]
    assert [c.reason for c in lost if c.config.method == "lora"] == ["ran: out of memory"]


def test_where_all_run_out_of_memory_nothing_fits(spec: Spec, tmp_path: Path) -> None:
    device = Device(spec, too_large=lambda config: True)

    with pytest.raises(NothingFitsError, match="nothing fits 4 GiB"):
        plan_with(device, tmp_path)

    assert device.probed


def test_what_was_probed_before_is_taken_up(spec: Spec, tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    first, second = Device(spec, record=record), Device(spec, record=record)

    before = plan_with(first, tmp_path)
    after = plan_with(second, tmp_path)

    assert len(second.probed) < len(first.probed)
    assert after.reused == len(first.probed)
    assert after.chosen.config == before.chosen.config


def test_what_was_probed_before_is_not_taken_up_where_fresh_is_asked(
    spec: Spec, tmp_path: Path
) -> None:
    record = tmp_path / "record.jsonl"
    first, second = Device(spec, record=record), Device(spec, record=record)
    plan_with(first, tmp_path)

    plan = plan_with(second, tmp_path, fresh=True)

    assert plan.reused == 0
    assert second.probed == first.probed


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("stack", "torch", "1.0"),
        ("stack", "peft", "0.1"),
        ("machine", "name", "another CPU"),
        (None, "architecture", "another model"),
    ],
)
def test_what_was_probed_elsewhere_is_not_taken_up(
    spec: Spec, tmp_path: Path, part: str | None, name: str, value: str
) -> None:
    record = tmp_path / "record.jsonl"
    first, second = Device(spec, record=record), Device(spec)
    plan_with(first, tmp_path)
    lines = [json.loads(line) for line in record.read_text("utf-8").splitlines()]
    for line in lines:
        (line if part is None else line[part])[name] = value
    record.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")

    plan = plan_with(second, tmp_path)

    assert plan.reused == 0
    assert second.probed == first.probed


def test_the_alternatives_have_reasons_and_hold_the_batch(spec: Spec, tmp_path: Path) -> None:
    plan = plan_with(Device(spec), tmp_path)

    assert plan.runners_up
    for other in plan.runners_up + plan.rejected:
        assert other.reason
        assert other.config.tokens_per_step == BATCH * 2048
    assert dict(plan.excluded)["kernels liger"]


@pytest.fixture
def plan(spec: Spec, tmp_path: Path) -> Plan:
    return plan_with(Device(spec), tmp_path, fixed={"method": "lora"})


def test_a_plan_survives_its_file(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "new" / "plan.json"

    write_plan(path, plan)

    assert read_plan(path) == plan
    assert [file.name for file in path.parent.iterdir()] == ["plan.json"]


def test_a_plan_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="must be a plan written by `plan --out`"):
        read_plan(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be read"),
        ('{"format": 1, "chosen": ', "cannot be read"),
        ("[1, 2]", "has no field `chosen`"),
        ('{"format": 1}', "has no field `chosen`"),
        ('{"format": 7, "chosen": {}}', "format 1, but it is of format 7; plan again"),
        ('{"format": 1, "chosen": {}}', "lacks a field"),
    ],
)
def test_a_damaged_plan_is_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text, "utf-8")

    with pytest.raises(DataError) as caught:
        read_plan(path)

    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [None, 3, "words", [], {}, [3], {"config": 3}])
def test_a_plan_with_a_field_of_the_wrong_kind_is_refused(
    plan: Plan, tmp_path: Path, value: object
) -> None:
    path = tmp_path / "plan.json"
    whole = json.loads(json.dumps(plan.to_json()))
    for name in ("spec", "machine", "stack", "architecture", "chosen"):
        path.write_text(json.dumps({**whole, name: value}), "utf-8")
        with pytest.raises(AdvisorError):
            read_plan(path)


def test_a_plan_goes_nowhere_where_nothing_can_be_written(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", "utf-8")

    with pytest.raises(OutputError, match="must be a place that can be written"):
        write_plan(tmp_path / "file" / "plan.json", plan)
