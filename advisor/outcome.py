"""What a training says: `Progress` while it runs, and at its end a `TrainingResult`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from lora_advisor.advisor.guards import HeldOut, Stop
from lora_advisor.advisor.known_rows import KnownRows
from lora_advisor.advisor.likelihood import Likelihood
from lora_advisor.advisor.preference_loss import Preference
from lora_advisor.advisor.recovery import Recovery
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.machine import Stack

#: Raised when result.json changes so that an older program would misread it.
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What the plan promised; None is "unknown".

    Attributes:
        padded_tokens_per_s: Tokens per second, padding included, as `Measured.padded_tokens_per_s`.
        peak_bytes: What the process holds at its peak, as `Measured.peak_bytes`.
        train_seconds: Time of the steps that were done, evaluation left out.
        seconds_per_token: Time of a token, padding included, in rows of the data's lengths; what
            `train_seconds` is made of where that is not known yet.
        start_seconds: What the first steps take longer, by the plan's proof; None without one.
    """

    padded_tokens_per_s: float | None = None
    peak_bytes: int | None = None
    train_seconds: float | None = None
    seconds_per_token: float | None = None
    start_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What came of it; None is "unknown".

    Attributes:
        tokens_per_s: Non-padding tokens per second, the median over the steps of this process after
            its first three.
        padded_tokens_per_s: The same with padding.
        step_s: Median time of these steps, in seconds.
        steps_measured: How many they were.
        train_seconds: Time of all steps and checkpoints, those before an interruption included.
        peak_bytes: Peak of the process on the device, CUDA context included; on a CPU its peak
            resident size.
        allocated_bytes: Peak of live tensors while training; None on a CPU.
        reserved_bytes: Peak of the caching allocator while training; None on a CPU.
    """

    tokens_per_s: float | None
    padded_tokens_per_s: float | None
    step_s: float | None
    steps_measured: int
    train_seconds: float
    peak_bytes: int | None
    allocated_bytes: int | None
    reserved_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How a training stands.

    Attributes:
        step: Optimizer steps done.
        steps: Optimizer steps in all.
        loss: Mean training loss since the last report.
        tokens_per_s: Non-padding tokens per second of the last steps.
        padded_tokens_per_s: The same with padding.
        peak_bytes: As in `Measured`, so far.
        seconds_left: Time the steps that are left will take, at the pace of the last ones.
        power_w: Power of the board, in watts; None without a card that tells.
    """

    step: int
    steps: int
    loss: float
    tokens_per_s: float
    padded_tokens_per_s: float
    peak_bytes: int | None
    seconds_left: float
    power_w: float | None = None


#: Fields that result.json has had since after its first version.
_LATER = (
    "likelihood", "known", "evaluations", "overfit", "stop", "recoveries", "preference",
    "long_dropped", "split", "pieces", "pieces_dropped",
)  # fmt: skip

#: How the fields are read that may be None.
_OPTIONAL: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "predicted": lambda data: Predicted(**data),
    "likelihood": lambda data: Likelihood(**data),
    "preference": lambda data: Preference(**data),
    "known": lambda data: KnownRows(**data),
    "overfit": Stop.from_json,
    "stop": Stop.from_json,
}


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """A training that has ended, as result.json holds it.

    Attributes:
        config: What was trained.
        model: What the user called the model.
        stack: With what.
        device: "cuda" or "cpu".
        data: The data file.
        data_sha256: Of its bytes.
        shape: Shape of its rows, one of `dataset.SHAPES`, or "preference" for pairs.
        rows: Rows trained on.
        holdout_rows: Rows held out.
        truncated: Rows cut to `seq_len`.
        dropped: Rows left out, because nothing of their answer was left.
        length_quantiles: Tokens that cover a share of the rows, by share.
        steps: Optimizer steps.
        eval_loss_before: Mean negative log-likelihood of a trained token of the hold-out, in nats,
            under the model as it came; of stage "dpo" the mean DPO loss of a pair, which is ln 2
            as long as adapter and reference agree. None without a hold-out.
        eval_loss_after: The same under the trained model.
        losses: Training loss by step, each the mean since the one before.
        adapter: Folder of the adapter (for method "full": of the model).
        resumed_from_step: Step the last process went on from; None if it began at 0.
        predicted: What the plan promised; None without a plan.
        measured: What came of it.
        likelihood: The hold-out under the base and the tuned model, row by row; None without a
            hold-out, of stage "dpo", or where the base model's figures are lost.
        known: Rows that the base model knew by heart; None if none were looked at.
        evaluations: The hold-out's loss while training and at its end.
        overfit: What showed over-fitting, whether or not it ended the training; None for nothing.
        stop: Why a guard ended the training; None if it went through.
        recoveries: Where memory ran out, and how it went on.
        preference: The hold-out of stage "dpo" before and after, pair by pair; None likewise.
        long_dropped: Rows left out because they are longer than `seq_len`.
        split: Rows that became several.
        pieces: Rows that these became; in `rows` and `holdout_rows` they count one by one.
        pieces_dropped: Pieces left out, because nothing of an answer is in them.
    """

    config: RunConfig
    model: str
    stack: Stack
    device: str
    data: Path
    data_sha256: str
    shape: str
    rows: int
    holdout_rows: int
    truncated: int
    dropped: int
    length_quantiles: Mapping[float, int]
    steps: int
    eval_loss_before: float | None
    eval_loss_after: float | None
    losses: tuple[tuple[int, float], ...]
    adapter: Path
    resumed_from_step: int | None
    predicted: Predicted | None
    measured: Measured
    likelihood: Likelihood | None = None
    known: KnownRows | None = None
    evaluations: tuple[HeldOut, ...] = ()
    overfit: Stop | None = None
    stop: Stop | None = None
    recoveries: tuple[Recovery, ...] = ()
    preference: Preference | None = None
    long_dropped: int = 0
    split: int = 0
    pieces: int = 0
    pieces_dropped: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        data.update(
            format=FORMAT,
            config=self.config.to_json(),
            stack=self.stack.to_json(),
            data=str(self.data),
            adapter=str(self.adapter),
            length_quantiles={str(share): n for share, n in self.length_quantiles.items()},
            losses=[list(pair) for pair in self.losses],
            measured=dataclasses.asdict(self.measured),
            evaluations=[dataclasses.asdict(held) for held in self.evaluations],
            recoveries=[recovery.to_json() for recovery in self.recoveries],
        )
        for name in _OPTIONAL:
            data[name] = None if data[name] is None else dataclasses.asdict(data[name])
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read the JSON form."""
        fields = [field.name for field in dataclasses.fields(cls)]
        # What an older version did not know is left at its default.
        values = {name: data[name] for name in fields if name in data or name not in _LATER}
        values.update(
            config=RunConfig.from_json(data["config"]),
            stack=Stack.from_json(data["stack"]),
            data=Path(data["data"]),
            adapter=Path(data["adapter"]),
            length_quantiles={float(share): n for share, n in data["length_quantiles"].items()},
            losses=tuple((int(step), float(loss)) for step, loss in data["losses"]),
            measured=Measured(**data["measured"]),
            evaluations=tuple(HeldOut(**held) for held in data.get("evaluations", ())),
            recoveries=tuple(Recovery.from_json(at) for at in data.get("recoveries", ())),
        )
        for name, kind in _OPTIONAL.items():
            values[name] = None if data.get(name) is None else kind(data[name])
        return cls(**values)
