"""The record of probes: every ending survives the way to the disk and back, and damage is said."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from lora_advisor.probes.config import LoraShape, RunConfig
from lora_advisor.probes.errors import DataError
from lora_advisor.probes.exchange import Answer
from lora_advisor.probes.machine import Machine, Stack
from lora_advisor.probes.record import ProbeResult, append_record, read_records, same_place

STACK = Stack(torch="2.11.0", transformers="5.23.0", peft="0.21.2", trl="1.16.0")
MACHINE = Machine(
    kind="cuda", name="NVIDIA H100", memory_bytes=85_520_809_984, capability="9.0", host="a CPU"
)


def result(outcome: str = "ok", detail: str | None = None) -> ProbeResult:
    config = RunConfig(
        model="qwen2.5-1.5b",
        method="qlora",
        micro_batch=2,
        seq_len=1024,
        optimizer="paged_adamw_8bit",
        precision="bf16",
        checkpointing="full",
        attention="sdpa",
        kernels="none",
        loss="fused",
        lora=LoraShape(r=16, alpha=32, dropout=0.0, targets=("q_proj", "v_proj")),
        compile="off",
        allocator="default",
    )
    return ProbeResult(
        config=config,
        architecture="0123456789abcdef",
        hf_config={"model_type": "qwen2", "num_hidden_layers": 28},
        machine=MACHINE,
        stack=STACK,
        outcome=outcome,
        detail=detail,
        reserved_bytes=1_922_000_000,
        step_times_s=(0.5, 0.4, 0.8),
        device_times_s=(0.4, 0.3, 0.7),
        host_times_s=(0.1, 0.1, 0.1),
        tokens_per_step=2048,
        joules=153.6,
        energy_source="sampled",
        throttled=("power cap",),
        unstable=False,
        contended=False,
        started_at="2026-11-23T20:29:33+00:00",
    )


def test_a_result_comes_back_from_json_as_it_went() -> None:
    assert ProbeResult.from_json(json.loads(json.dumps(result().to_json()))) == result()


def test_results_come_back_from_a_file_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "record.jsonl"
    written = [result(), result("out_of_memory", "no room"), result("timed_out")]
    for one in written:
        append_record(path, one)
    assert read_records(path) == written


def test_no_file_is_an_empty_record(tmp_path: Path) -> None:
    assert read_records(tmp_path / "record.jsonl") == []


def test_the_median_step_gives_speed_and_energy() -> None:
    assert result().step_s == 0.5
    assert result().tokens_per_s == 4096.0  # 2048 tokens in 0.5 s
    assert result().joules_per_token == pytest.approx(0.025)  # 153.6 J over 3 steps of 2048 tokens


@pytest.mark.parametrize(("warmup_s", "start_s"), [(None, 0.0), (0.9, 0.0), (5.0, 4.0)])
def test_the_start_is_what_the_first_two_steps_took_longer(
    warmup_s: float | None, start_s: float
) -> None:
    assert dataclasses.replace(result(), warmup_s=warmup_s).start_s == start_s


def test_a_result_without_steps_has_no_speed() -> None:
    empty = dataclasses.replace(result("failed"), step_times_s=())
    assert (empty.step_s, empty.tokens_per_s, empty.joules_per_token) == (None, None, None)


def test_a_line_torn_by_a_kill_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    append_record(path, result())
    append_record(path, result("failed"))
    path.write_bytes(path.read_bytes()[:-100])
    assert [one.outcome for one in read_records(path)] == ["ok"]


def test_the_line_after_a_torn_one_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    append_record(path, result())
    path.write_bytes(path.read_bytes()[:-100])
    append_record(path, result("timed_out"))
    append_record(path, result("failed"))
    assert [one.outcome for one in read_records(path)] == ["timed_out", "failed"]
    assert len(path.read_text("utf-8").splitlines()) == 3


def test_a_line_that_is_no_record_is_refused_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    append_record(path, result())
    with path.open("a") as file:
        file.write("hello\n")
    append_record(path, result())
    with pytest.raises(DataError, match=r"line 2 must be a JSON record, but it is damaged"):
        read_records(path)


@pytest.mark.parametrize("line", ['{"format": 999}', "[1, 2]", '{"config": {}}'])
def test_a_record_of_another_format_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "record.jsonl"
    path.write_text(line + "\n", "utf-8")
    with pytest.raises(DataError, match=r"line 1 must be a record of format 1, but it is of"):
        read_records(path)


def test_fields_of_a_newer_version_are_dropped(tmp_path: Path) -> None:
    data = {"format": 1, **result().to_json(), "fan_speed": 3}
    data["machine"]["colour"] = "green"
    path = tmp_path / "record.jsonl"
    path.write_text(json.dumps(data) + "\n", "utf-8")
    assert read_records(path) == [result()]


def test_energy_of_an_older_version_came_from_the_counter() -> None:
    data = result().to_json()
    for name in ("energy_source", "throttled", "unstable"):
        del data[name]
    old = ProbeResult.from_json(data)
    assert (old.energy_source, old.throttled, old.unstable) == ("counter", None, None)
    assert old.doubts == ()
    assert ProbeResult.from_json({**data, "joules": None}).energy_source is None


@pytest.mark.parametrize(
    ("seen", "doubts"),
    [
        ({}, ()),  # held down by the power limit alone, as the result is
        ({"throttled": ()}, ()),
        ({"throttled": None, "unstable": None, "contended": None}, ()),  # unknown is no doubt
        ({"contended": True}, ("another process used the device",)),
        ({"unstable": True}, ("the step times vary",)),
        ({"throttled": ("power cap", "temperature")}, ("the clock was held down: temperature",)),
        ({"unstable": True, "outcome": "out_of_memory"}, ()),  # there is no time to doubt
    ],
)
def test_a_time_is_doubted_for_a_reason(seen: dict[str, Any], doubts: tuple[str, ...]) -> None:
    assert dataclasses.replace(result(), **seen).doubts == doubts


def test_another_machine_or_stack_is_another_place() -> None:
    assert same_place(result(), MACHINE, STACK)
    assert not same_place(result(), dataclasses.replace(MACHINE, driver="580.1"), STACK)
    assert not same_place(result(), MACHINE, dataclasses.replace(STACK, torch="2.13.0"))
    assert not same_place(result(), MACHINE, dataclasses.replace(STACK, step=2))
    assert dataclasses.replace(STACK, step=2).packages() == STACK.packages()


def test_an_answer_has_only_fields_of_a_result(tmp_path: Path) -> None:
    names = {field.name for field in dataclasses.fields(ProbeResult)}
    assert {field.name for field in dataclasses.fields(Answer)} < names


def test_an_answer_comes_back_from_its_file_as_it_went(tmp_path: Path) -> None:
    answer = Answer(
        outcome="ok",
        step_times_s=(0.5, 0.25),
        trainable=8192,
        power_w=300.5,
        throttled=("temperature",),
    )
    answer.write(tmp_path / "answer.json")
    assert Answer.read(tmp_path / "answer.json") == answer
    assert Answer.read(tmp_path / "no answer.json") is None
