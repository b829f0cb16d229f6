"""The study on disk: Optuna opens it, it holds what was measured, and it does not mix places."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any

import optuna
import pytest
from made_up_device import Device, plan_with
from traced_once import save_figures, share_traces

from lora_advisor.advisor.study_file import check_study_file, write_study
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import DataError, OutputError, StackError
from lora_advisor.probes.machine import GIB, cpu_machine, detect_stack
from lora_advisor.probes.plan import Plan
from lora_advisor.probes.spec import Spec


@pytest.fixture(autouse=True)
def _shared_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    share_traces(monkeypatch)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(
        Spec(
            model=save_figures(tmp_path / "tiny"),
            vram_bytes=4 * GIB,
            seq_len=2048,
            effective_batch=4,
            device="cpu",
            free_trials=2,
            fixed={"precision": "bf16", "optimizer": "adamw_torch_fused"},
        )
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "new" / "studies.db"


def studies(file: Path) -> list[optuna.Study]:
    storage = f"sqlite:///{file}"
    names = optuna.get_all_study_names(storage)
    return [optuna.load_study(study_name=name, storage=storage) for name in names]


def change(file: Path, key: str, value: Any) -> None:
    """Change an attribute of the studies behind the program's back."""
    with contextlib.closing(sqlite3.connect(file)) as connection, connection:
        changed = connection.execute(
            "UPDATE study_user_attributes SET value_json = ? WHERE key = ?",
            (json.dumps(value), key),
        )
        assert changed.rowcount == 1


def test_optuna_opens_the_study_and_finds_what_was_measured(device: Device, file: Path) -> None:
    plan = plan_with(device, file.parent, study_file=file)

    (study,) = studies(file)
    assert len(study.trials) == plan.trials
    assert study.user_attrs["chosen"] == plan.chosen.config.to_json()
    assert study.user_attrs["machine"] == plan.machine.to_json()
    assert device.spec.model in study.study_name
    measured = {
        RunConfig.from_json(trial.user_attrs["config"]): trial.user_attrs["measured_tokens_per_s"]
        for trial in study.trials
        if "measured" in trial.user_attrs
    }
    assert measured[plan.chosen.config] == plan.chosen.tokens_per_s
    assert len(measured) > 1
    assert all(speed == pytest.approx(device.speed(config)) for config, speed in measured.items())
    assert study.metric_names == ["tokens_per_s"]
    # What the study calls its best is something that fits.
    assert study.best_trial.user_attrs["verdict"] == "fits"
    assert all(
        trial.system_attrs["constraints"] == [trial.constraints["memory"]]
        for trial in study.trials
        if trial.value
    )
    # Every trial that was looked at says what the models said.
    assert all(trial.user_attrs["verdict"] == "fits" for trial in study.trials if trial.value)


def test_another_plan_adds_another_study(device: Device, file: Path) -> None:
    first = plan_with(device, file.parent, study_file=file)
    second = plan_with(device, file.parent, study_file=file, seq_len=1024)

    assert [len(study.trials) for study in studies(file)] == [first.trials, second.trials]


def test_plans_of_the_same_second_are_two_studies(device: Device, file: Path) -> None:
    study, plan = optuna.create_study(), plan_with(device, file.parent)
    for _ in range(3):
        write_study(file, study, plan, ())

    assert len(studies(file)) == 3


def test_a_plan_is_not_lost_with_its_study(device: Device, file: Path) -> None:
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if "expected to gain" in line:  # probing is over: someone takes the place away
            file.parent.rmdir()
            file.parent.touch()

    plan = plan_with(device, file.parent.parent, study_file=file, say=say)

    assert plan.chosen.measured is not None
    assert any("study is not kept" in line and "studies.db" in line for line in said)


@pytest.fixture
def written(device: Device, file: Path) -> Plan:
    plan = plan_with(device, file.parent, study_file=file)
    device.asked.clear()
    return plan


@pytest.mark.parametrize(
    ("part", "name", "words"),
    [
        ("machine", "name", "another machine (name another there, "),
        ("stack", "torch", "another stack (torch another there, "),
    ],
)
def test_a_file_of_another_place_is_refused_before_a_probe(
    written: Plan, device: Device, file: Path, part: str, name: str, words: str
) -> None:
    change(file, part, {**getattr(written, part).to_json(), name: "another"})

    with pytest.raises(StackError) as caught:
        plan_with(device, file.parent, study_file=file)

    assert words in str(caught.value)
    assert device.asked == []
    assert len(studies(file)) == 1


@pytest.mark.usefixtures("written")
def test_a_file_of_another_format_is_refused(file: Path) -> None:
    change(file, "format", 7)

    with pytest.raises(DataError, match="studies of format 1, but they are of format 7"):
        check_study_file(file, cpu_machine(), detect_stack())


def test_a_file_of_something_else_is_refused(file: Path) -> None:
    file.parent.mkdir()
    file.write_text("not a database, but words enough to look like a page of one\n" * 100)
    with pytest.raises(DataError, match="must be a SQLite file of Optuna's studies, but file is"):
        check_study_file(file, cpu_machine(), detect_stack())

    file.unlink()
    with contextlib.closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE other (value)")
    with pytest.raises(DataError, match="no such table"):
        check_study_file(file, cpu_machine(), detect_stack())


def test_what_is_not_there_yet_is_fine(file: Path) -> None:
    check_study_file(file, cpu_machine(), detect_stack())

    assert not file.exists()


def test_a_place_that_cannot_be_written_is_refused_before_a_probe(
    device: Device, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(OutputError, match=r"studies\.db` must be a place that can be written"):
        plan_with(device, tmp_path, study_file=tmp_path / "file" / "studies.db")

    assert device.asked == []  # it is said before the probes are run
