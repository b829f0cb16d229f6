"""What a report is made of: a plan, a run folder, or both. Only reads."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_advisor.advisor.journal import JOURNAL
from lora_advisor.advisor.outcome import Progress, TrainingResult
from lora_advisor.advisor.result_files import SAMPLES, read_samples
from lora_advisor.advisor.run_folder import PLAN, RESULT, STATE, read_json
from lora_advisor.advisor.samples import Sample
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import DataError, MissingInputError, UsageError
from lora_advisor.probes.machine import Stack
from lora_advisor.probes.plan import Plan, read_plan
from lora_advisor.probes.trail import Probed


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training, ended or not, as its folder tells.

    Attributes:
        name: Name of the folder.
        config: What is trained; None where the folder does not say.
        device: "cuda" or "cpu"; None likewise.
        stack: With what; None likewise.
        points: What was reported, by step; of two reports of a step the later.
        events: What happened: the step it happened after, what kind, and the sentence.
        eval_loss_before: Loss of the hold-out under the base model; None if not known.
        result: What it came to; None where the training has not ended.
        samples: What base and tuned model say, none of a training that has not ended; or why that
            is unknown.
    """

    name: str
    config: RunConfig | None
    device: str | None
    stack: Stack | None
    points: tuple[Progress, ...]
    events: tuple[tuple[int, str, str], ...]
    eval_loss_before: float | None
    result: TrainingResult | None
    samples: tuple[Sample, ...] | str = ()


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a report is made of.

    Attributes:
        name: What the user called it.
        plan: The plan; None for a run that was begun without one.
        run: The training; None for a plan that was not trained with.
        trail: What the plan's probes were, in order.
        recomputed: Whether what was expected of them was computed again, by this program.
    """

    name: str
    plan: Plan | None
    run: Run | None
    trail: tuple[Probed, ...] = ()
    recomputed: bool = False


def read_source(path: Path) -> Source:
    """Read a plan or the folder of a training.

    Raises:
        UsageError: It is neither.
        MissingInputError: It is not there.
        DataError: It is one of them, and damaged.
    """
    if not path.exists():
        raise MissingInputError(
            f"`{path}` must be a plan or the folder of a training, but it is not there."
        )
    if path.is_dir():
        return _of_folder(path)
    if "chosen" not in (read_json(path) or {}):
        raise UsageError(
            f"`{path}` must be a plan written by `plan --out` or the folder of a training, but it "
            "is neither."
        )
    plan = read_plan(path)
    return Source(name=path.name, plan=plan, run=None, trail=trail_of(plan))


def _of_folder(path: Path) -> Source:
    state, journal = read_json(path / STATE), path / JOURNAL
    if state is None or "identity" not in state:
        raise UsageError(
            f"`{path}` must be the folder of a training, or a plan written by `plan --out`, but it "
            f"holds no {STATE} of a training."
        )
    try:
        plan = read_plan(path / PLAN) if (path / PLAN).exists() else None
        result = read_json(path / RESULT)
        run = _run(path, state, journal, result)
    except (KeyError, TypeError, AttributeError, ValueError, OSError, UsageError) as error:
        raise DataError(
            f"`{path}` must be the folder of a training, but what is in it is damaged: {error!r}."
        ) from None
    trail = () if plan is None else trail_of(plan)
    return Source(name=path.resolve().name, plan=plan, run=run, trail=trail)


def _run(
    path: Path, state: Mapping[str, Any], journal: Path, result: Mapping[str, Any] | None
) -> Run:
    identity = state["identity"]
    names = {field.name for field in dataclasses.fields(RunConfig)}
    known = {name: value for name, value in identity.items() if name in names}
    points, events = _journal(journal)
    return Run(
        name=path.resolve().name,
        config=RunConfig.from_json(known) if "method" in known else None,
        device=state.get("stack", {}).get("device"),
        stack=Stack.from_json(state["stack"]) if state.get("stack") else None,
        points=points,
        events=events,
        eval_loss_before=state.get("eval_loss_before"),
        result=None if result is None else TrainingResult.from_json(result),
        # Without a result they would be those of an earlier training in the same folder.
        samples=read_samples(path) if result is not None and (path / SAMPLES).exists() else (),
    )


def _journal(
    file: Path,
) -> tuple[tuple[Progress, ...], tuple[tuple[int, str, str], ...]]:
    """Read what was reported; a line that a kill or a power loss has torn is left out.

    A training that goes on from a checkpoint reports steps again: the later reports count.
    """
    points: list[Progress] = []
    events: list[tuple[int, str, str]] = []
    if not file.exists():
        return (), ()
    names = {field.name for field in dataclasses.fields(Progress)}
    for line in file.read_text("utf-8", "replace").splitlines():
        try:
            data = json.loads(line)
        except ValueError:
            continue
        if not isinstance(data, dict):
            continue
        if data.get("event") != "progress":
            step = points[-1].step if points else 0
            events.append((step, str(data.get("event")), str(data.get("text", ""))))
            continue
        # What was no number stands there as null.
        numbers: dict[str, Any] = {
            name: math.nan if data[name] is None and name not in ("peak_bytes", "power_w")
            else data[name]
            for name in names & data.keys()
        }  # fmt: skip
        point = Progress(**numbers)
        while points and points[-1].step >= point.step:
            points.pop()
        points.append(point)
    return tuple(points), tuple(events)


def trail_of(plan: Plan) -> tuple[Probed, ...]:
    """Return what ran for a plan, in order.

    A plan of an older program holds only those runs that stand in its tables, and not what was
    expected of them before.
    """
    if plan.trail:
        return plan.trail
    candidates = [plan.chosen, *([plan.baseline] if plan.baseline else [])]
    candidates += [*plan.runners_up, *plan.rejected, *plan.front]
    ran: dict[tuple[str | None, RunConfig], Probed] = {}
    for candidate in candidates:
        result = candidate.measured
        if result is not None:
            why = "proof" if candidate is plan.chosen else ""
            why = "baseline" if candidate is plan.baseline else why
            ran.setdefault((result.started_at, result.config), Probed.of(result, why))
    return tuple(sorted(ran.values(), key=lambda probed: probed.started_at or ""))
