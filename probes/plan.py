"""`Plan`: what to run, how that is known, and what lost against it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from lora_advisor.probes.architectures import Architecture
from lora_advisor.probes.batching import Batching, batching_of
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import DataError, MissingInputError, OutputError, UsageError
from lora_advisor.probes.machine import Machine, Stack
from lora_advisor.probes.prediction import Interval, MemoryPrediction, Prediction
from lora_advisor.probes.record import ProbeResult
from lora_advisor.probes.saving import Rental, Saving
from lora_advisor.probes.scaling import Scaling
from lora_advisor.probes.spec import Spec
from lora_advisor.probes.trail import Considered, Probed

#: Raised when the meaning of a field changes.
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A configuration with what is expected of it and, if it ran, what came of it.

    Attributes:
        config: The configuration.
        prediction: What the models say of it.
        measured: Its probe; None if it did not run.
        reason: Why it was not chosen; None for the chosen one.
    """

    config: RunConfig
    prediction: Prediction
    measured: ProbeResult | None = None
    reason: str | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second, measured where it ran, else predicted."""
        if self.measured is not None and self.measured.tokens_per_s is not None:
            return self.measured.tokens_per_s
        speed = self.prediction.tokens_per_s
        return None if speed is None else speed.value

    @property
    def joules_per_token(self) -> float | None:
        """Energy of a token, measured where it ran, else predicted."""
        if self.measured is not None and self.measured.joules_per_token is not None:
            return self.measured.joules_per_token
        energy = self.prediction.joules_per_token
        return None if energy is None else energy.value

    @property
    def evidence(self) -> str:
        """How its figures are known."""
        ran = self.measured is not None and self.measured.outcome == "ok"
        return "proved" if ran else self.prediction.evidence


@dataclass(frozen=True, kw_only=True)
class DataSummary:
    """What a data set asks for.

    Attributes:
        path: The file.
        rows: Rows, or pairs, that will be trained on.
        tokens: Their tokens, padding not counted, for one pass; of a pair those of both sequences.
        truncated: Rows cut to the sequence length.
        dropped: Rows left out: nothing of their answer was left.
        long_dropped: Rows left out because they are longer than a sequence.
        split: Rows that became several.
        pieces: Rows that these became; they count among `rows` one by one.
        pieces_dropped: Pieces left out: nothing of an answer is in them.
        length_counts: How many rows have each length after cutting, shortest first; empty in a plan
            of an older program. The length of a pair is that of its longer sequence.
        sequences: Sequences that a row makes: 2 for a pair.
    """

    path: str
    rows: int
    tokens: int
    truncated: int
    dropped: int
    long_dropped: int = 0
    split: int = 0
    pieces: int = 0
    pieces_dropped: int = 0
    length_counts: tuple[tuple[int, int], ...] = ()
    sequences: int = 1

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; the counts are an object from length to rows."""
        counts = {str(length): rows for length, rows in self.length_counts}
        data = {**vars(self), "length_counts": counts}
        if self.sequences == 1:  # as older programs take it to be
            del data["sequences"]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read the JSON form."""
        counts = (data.get("length_counts") or {}).items()
        ordered = tuple(sorted((int(length), rows) for length, rows in counts))
        return cls(**{**data, "length_counts": ordered})


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to run.

    Attributes:
        spec: What the user wanted.
        machine: Where it is to run.
        stack: With what.
        architecture: The model's figures and where its weights are.
        chosen: The winner.
        baseline: What the user would have run otherwise; None if that is not possible.
        runners_up: The next best, best first.
        rejected: The best of those that cannot run, with reasons.
        excluded: Parts of the space that were left out, with reasons.
        cap_bytes: What the device's allocator is allowed.
        context_bytes: What the process holds on the device beside it.
        probes: Probes run for this plan.
        reused: Results of earlier probes it rests on.
        probing_s: Seconds the probes took.
        wall_s: Seconds the plan took.
        trials: Configurations the search looked at.
        data: What the data asks for; None without data.
        front: Configurations of which none is better in speed, energy and sequence length.
        batchings: What one pass over the data costs under each way to make micro-batches that the
            trainer knows, the chosen one among them; empty where that was not asked.
        trail: What ran, in order, with what was expected; empty in a plan of an older program.
        considered: What the search looked at, in short; likewise.
        proposed_batch: A smaller effective batch that the data suggests where the user named none;
            told, never taken.
        savings: What would make a long training shorter on this card; empty for others.
        rentals: What it would take and cost on cards for rent; likewise, or where prices came.
        scaling: What several cards come to together, of which `chosen` is one's share; None for
            one card.
        imported: Runs of others, on such a card in another machine, that the models learnt from.
        imported_from: That machine; None without any.
    """

    spec: Spec
    machine: Machine
    stack: Stack
    architecture: Architecture
    chosen: Candidate
    baseline: Candidate | None
    runners_up: tuple[Candidate, ...]
    rejected: tuple[Candidate, ...]
    excluded: tuple[tuple[str, str], ...]
    cap_bytes: int | None
    context_bytes: int | None
    probes: int
    reused: int
    probing_s: float
    wall_s: float
    trials: int
    data: DataSummary | None = None
    front: tuple[Candidate, ...] = ()
    batchings: tuple[Batching, ...] = ()
    trail: tuple[Probed, ...] = ()
    considered: tuple[Considered, ...] = ()
    proposed_batch: int | None = None
    savings: tuple[Saving, ...] = ()
    rentals: tuple[Rental, ...] = ()
    scaling: Scaling | None = None
    imported: int = 0
    imported_from: Machine | None = None

    @property
    def batching(self) -> Batching | None:
        """What a pass costs as the chosen configuration makes its micro-batches."""
        name = batching_of(self.chosen.config)
        return next((batching for batching in self.batchings if batching.name == name), None)

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second, padding included: of all cards predicted, of one as it is known."""
        if self.scaling is None:
            return self.chosen.tokens_per_s
        return None if self.scaling.tokens_per_s is None else self.scaling.tokens_per_s.value

    @property
    def epoch_s(self) -> float | None:
        """Seconds for one pass over the data at the chosen speed.

        Where the lengths of its rows were not priced, every row counts as a full one.
        """
        if self.batching is not None and self.batching.seconds is not None:
            return self.batching.seconds.value
        speed = self.tokens_per_s
        if self.data is None or speed is None:
            return None
        return self.data.rows * self.data.sequences * self.chosen.config.seq_len / speed

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"format": FORMAT, **_plain(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read the JSON form."""
        values = {field.name: data.get(field.name) for field in dataclasses.fields(cls)}
        architecture = data["architecture"]
        values.update(
            spec=Spec.from_json(data["spec"]),
            machine=Machine.from_json(data["machine"]),
            stack=Stack.from_json(data["stack"]),
            architecture=Architecture(**architecture),
            chosen=_candidate(data["chosen"]),
            baseline=None if data["baseline"] is None else _candidate(data["baseline"]),
            runners_up=tuple(_candidate(item) for item in data["runners_up"]),
            rejected=tuple(_candidate(item) for item in data["rejected"]),
            front=tuple(_candidate(item) for item in data.get("front", ())),
            excluded=tuple((what, why) for what, why in data["excluded"]),
            data=None if data.get("data") is None else DataSummary.from_json(data["data"]),
            scaling=None if data.get("scaling") is None else Scaling.from_json(data["scaling"]),
            imported=data.get("imported") or 0,
            imported_from=Machine.from_json(data["imported_from"])
            if data.get("imported_from")
            else None,
            batchings=tuple(Batching.from_json(item) for item in data.get("batchings") or ()),
            trail=tuple(Probed.from_json(item) for item in data.get("trail") or ()),
            considered=tuple(Considered.from_json(item) for item in data.get("considered") or ()),
            savings=tuple(Saving.from_json(item) for item in data.get("savings") or ()),
            rentals=tuple(Rental.from_json(item) for item in data.get("rentals") or ()),
        )
        return cls(**values)  # type: ignore[arg-type]


def write_plan(path: Path, plan: Plan) -> None:
    """Write a plan; the file is whole or not there.

    Raises:
        OutputError: The place cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(plan.to_json(), indent=2) + "\n", "utf-8")
        part.replace(path)
    except OSError as error:
        raise OutputError(
            f"`{path}` must be a place that can be written, but {error.strerror}."
        ) from None


def read_plan(path: Path) -> Plan:
    """Read a plan.

    Raises:
        MissingInputError: There is no such file.
        DataError: It is no plan, or one of another format version.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise MissingInputError(
            f"`{path}` must be a plan written by `plan --out`, but it is not there."
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(
            f"`{path}` must be a plan written by `plan --out`, but it cannot be read: {error}."
        ) from None
    if not isinstance(data, dict) or "chosen" not in data:
        raise DataError(
            f"`{path}` must be a plan written by `plan --out`, but it has no field `chosen`."
        )
    if data.get("format") != FORMAT:
        raise DataError(
            f"`{path}` must be a plan of format {FORMAT}, but it is of format "
            f"{data.get('format')!r}; plan again."
        )
    try:
        return Plan.from_json(data)
    except (KeyError, TypeError, AttributeError, ValueError, UsageError) as error:
        raise DataError(
            f"`{path}` must be a plan written by `plan --out`, but it lacks a field or has one of "
            f"another kind: {error}."
        ) from None


def _plain(value: Any) -> Any:
    """Turn words into JSON: dataclasses by their own `to_json` where they have one."""
    if hasattr(value, "to_json") and not isinstance(value, Plan):
        return value.to_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def plain_json(value: Any) -> Any:
    """Return the JSON form of any word."""
    return _plain(value)


def _candidate(data: Mapping[str, Any]) -> Candidate:
    return Candidate(
        config=RunConfig.from_json(data["config"]),
        prediction=_prediction(data["prediction"]),
        measured=None if data["measured"] is None else ProbeResult.from_json(data["measured"]),
        reason=data["reason"],
    )


def _prediction(data: Mapping[str, Any]) -> Prediction:
    def interval(value: Mapping[str, float] | None) -> Interval | None:
        return None if value is None else Interval(**value)

    return Prediction(
        memory=MemoryPrediction(**data["memory"]),
        verdict=data["verdict"],
        step_s=interval(data["step_s"]),
        tokens_per_s=interval(data["tokens_per_s"]),
        evidence=data["evidence"],
        joules_per_token=interval(data.get("joules_per_token")),
        energy_source=data.get("energy_source"),
    )
