"""The search's study on disk: a SQLite file that optuna-dashboard opens."""

from __future__ import annotations

import json
import sqlite3
import warnings
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_advisor.advisor.arms import short_form
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import DataError, OutputError, StackError
from lora_advisor.probes.machine import GIB, Machine, Stack
from lora_advisor.probes.plan import Plan
from lora_advisor.probes.record import ProbeResult

if TYPE_CHECKING:
    import optuna

#: Raised when what a study keeps changes its meaning.
FORMAT = 1


def write_study(
    path: Path, study: optuna.Study, plan: Plan, results: Sequence[ProbeResult]
) -> None:
    """Add a plan's study to a file, with what was measured beside what was predicted.

    Args:
        path: The file.
        study: The search's.
        plan: What it came to.
        results: Probes behind it; the last one of a configuration counts, and a probe of fewer
            micro-batches a step stands for all that share it.

    Raises:
        DataError: The file is no file of studies, or of another format version.
        StackError: Its studies are of another machine or stack.
        OutputError: The place cannot be written.
    """
    import optuna

    check_study_file(path, plan.machine, plan.stack)
    measured = {result.config: result for result in results}
    # Two plans of one second are two studies.
    now = datetime.now(UTC).isoformat(timespec="microseconds")
    spec = plan.spec
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = optuna.create_study(
            storage=f"sqlite:///{path}",
            study_name=f"{spec.model}, {spec.vram_bytes / GIB:g} GiB, {spec.seq_len} tokens, {now}",
            directions=study.directions,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            kept.set_metric_names([spec.objective])
        for name, value in _attributes(plan.machine, plan.stack, plan).items():
            kept.set_user_attr(name, value)
        kept.add_trials([_with_measured(trial, measured) for trial in study.trials])
    except Exception as error:  # of sqlite3, SQLAlchemy and Optuna, whichever meets it first
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OutputError(
            f"`{path}` must be a place where a study can be written, but {first}."
        ) from None


def get_ready() -> None:
    """Import what writing a study takes 1 s for, while something else is waited for."""
    import optuna

    optuna.storages.RDBStorage("sqlite://")


def check_study_file(path: Path, machine: Machine, stack: Stack) -> None:
    """Refuse a file whose studies do not belong beside those of this machine and stack.

    Raises:
        DataError: It is no file of studies, or of another format version.
        StackError: It is of another machine or stack.
    """
    if not path.exists():
        return
    try:
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        try:
            rows = connection.execute(
                "SELECT key, value_json FROM study_user_attributes"
            ).fetchall()
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise DataError(
            f"`{path}` must be a SQLite file of Optuna's studies, but {error}; name another file."
        ) from None
    for key, text in rows:
        value = json.loads(text)
        if key == "format" and value != FORMAT:
            raise DataError(
                f"`{path}` must hold studies of format {FORMAT}, but they are of format {value}; "
                "name another file."
            )
        for what, mine in (("machine", machine.to_json()), ("stack", stack.to_json())):
            if key == what and value != mine:
                raise StackError(
                    f"`{path}` holds studies of another {what} ({_difference(value, mine)}); "
                    "name another file."
                )


def _difference(there: dict[str, Any], here: dict[str, Any]) -> str:
    return "; ".join(
        f"{name} {there.get(name)} there, {value} here"
        for name, value in here.items()
        if there.get(name) != value
    )


def _attributes(machine: Machine, stack: Stack, plan: Plan) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "machine": machine.to_json(),
        "stack": stack.to_json(),
        "spec": plan.spec.to_json(),
        "chosen": plan.chosen.config.to_json(),
    }


def _with_measured(
    trial: optuna.trial.FrozenTrial, measured: Mapping[RunConfig, ProbeResult]
) -> optuna.trial.FrozenTrial:
    if trial.constraints:
        # Where optuna-dashboard 0.21 looks for them (_serializer.py, `CONSTRAINTS_KEY`).
        trial.system_attrs["constraints"] = list(trial.constraints.values())
    if "config" in trial.user_attrs:
        config = RunConfig.from_json(trial.user_attrs["config"])
        result = measured.get(config) or measured.get(short_form(config))
        if result is not None:
            trial.user_attrs["measured"] = result.outcome
            trial.user_attrs["measured_tokens_per_s"] = result.tokens_per_s
    return trial
