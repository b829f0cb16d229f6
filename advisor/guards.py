"""When a training has gone wrong: a loss that leaps or is no number, a hold-out that gets worse.

What is looked at is the loss of every optimizer step, not the reported ones, which are means over
as many steps as a second holds: so the verdict does not depend on the speed of the machine.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import AdvisorError

#: The baseline is the median of so many steps before, once there are `BASELINE_LEAST`.
BASELINE_STEPS, BASELINE_LEAST = 20, 10

#: A spike is a mean of `SPIKE_STEPS` successive losses above the baseline by more than this many
#: nats. One step may stand out because its rows do; three in a row are the model.
SPIKE_NATS, SPIKE_STEPS = 2.0, 3

#: A spike is often climbed in steps: what stood above half of it, up to so many steps before, is
#: part of it.
ONSET_STEPS = 5

#: Steps from the last good model to where a spike is seen.
SEEN_AFTER_STEPS = ONSET_STEPS + SPIKE_STEPS

#: With a GradScaler a step whose gradients overflow is left out, and the scale is halved; so many
#: losses in a row that are no numbers are the model's.
SCALED_STEPS = 3

#: The hold-out's loss must lie above its best in so many evaluations on end to be over-fitting.
OVERFIT_EVALUATIONS = 2

#: And by more than so much, in nats: 2 % of the perplexity. Less is no harm worth an end.
OVERFIT_NATS = 0.02


class DivergedError(AdvisorError):
    """A training that went wrong before there was a checkpoint to keep."""

    exit_code: ClassVar[int] = 3


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Why a guard ended a training.

    Attributes:
        reason: "loss spike", "non-finite loss", "non-finite gradient" or "over-fitting".
        step: The first optimizer step that showed it; for over-fitting the last evaluation's.
        good_step: The last step after which the model was good, as far as is known.
        detail: What was seen.
        advice: What to do, one thing each.
        kept_step: Step of the checkpoint or evaluation that the adapter offered is from.
    """

    reason: str
    step: int
    good_step: int
    detail: str
    advice: tuple[str, ...] = ()
    kept_step: int | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read the JSON form."""
        return cls(**{**data, "advice": tuple(data["advice"])})

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """One evaluation while training.

    Attributes:
        step: Optimizer steps done.
        loss: Mean negative log-likelihood of a trained token of the hold-out, in nats; of stage
            "dpo" the mean DPO loss of a pair.
        train_loss: Mean training loss of the steps since the evaluation before; None without any.
    """

    step: int
    loss: float
    train_loss: float | None


def find_divergence(
    losses: Sequence[float], new: int, *, scaled: bool, start: float | None = None
) -> Stop | None:
    """Return the first sign, among the newest losses, that the training has gone wrong.

    Args:
        losses: Training loss of each step from step 1 on.
        new: How many of the last ones were not looked at before.
        scaled: Whether a GradScaler leaves out steps that overflow.
        start: What the loss is before anything is learnt, where that is known: the DPO loss of an
            adapter that is still zero is ln 2. It stands for the steps that a baseline lacks.
    """
    for index in range(len(losses) - new, len(losses)):
        stop = _not_finite(losses, index, SCALED_STEPS if scaled else 1)
        stop = stop or _spike(losses, index, start)
        if stop is not None:
            return stop
    return None


def _not_finite(losses: Sequence[float], index: int, run: int) -> Stop | None:
    last = losses[max(0, index - run + 1) : index + 1]
    if len(last) < run or any(math.isfinite(loss) for loss in last):
        return None
    first = index - run + 2  # steps count from 1
    return Stop(
        reason="non-finite loss",
        step=first,
        # The loss of a step is that of the model before its update: the model that gave this one
        # came of the step before, and the one that was certainly good of the step before that.
        good_step=first - 2,
        detail=f"the training loss of step {first} is {losses[first - 1]}",
    )


def _spike(losses: Sequence[float], index: int, start: float | None) -> Stop | None:
    first = index - SPIKE_STEPS + 1
    if first < 0:
        return None
    before = [loss for loss in losses[max(0, first - BASELINE_STEPS) : max(0, first)]]
    before = [loss for loss in before if math.isfinite(loss)]
    known = f"median of {len(before)} steps"
    if start is not None and len(before) < BASELINE_LEAST:
        known += f" and the start's {start:.2f}"
        before = [*before, *[start] * (BASELINE_LEAST - len(before))]
    if len(before) < BASELINE_LEAST:
        return None
    baseline, mean = statistics.median(before), statistics.fmean(losses[first : index + 1])
    if not mean > baseline + SPIKE_NATS:
        return None
    # A climb may dip on its way: the first step that stood out counts, not the last in a row.
    climb = range(max(0, first - ONSET_STEPS), first)
    onset = next((step for step in climb if losses[step] > baseline + SPIKE_NATS / 2), first)
    return Stop(
        reason="loss spike",
        step=first + 1,
        # The loss at the onset, of step onset + 1, is that of the model after step onset.
        good_step=max(0, onset - 1),
        detail=f"the training loss rose from {baseline:.2f} ({known}) to {mean:.2f} in the steps "
        f"{first + 1} to {index + 1}",
    )


def not_finite_gradient(step: int, norm: float) -> Stop:
    """Return the stop for a gradient that is no number: the model is spoilt by its update."""
    return Stop(
        reason="non-finite gradient",
        step=step,
        good_step=step - 1,
        detail=f"the gradient norm of step {step} is {norm}",
    )


def find_overfit(evaluations: Sequence[HeldOut]) -> Stop | None:
    """Return the stop where the hold-out gets worse while the training loss still falls."""
    if len(evaluations) <= OVERFIT_EVALUATIONS:
        return None
    best = min(evaluations, key=lambda held: held.loss)
    last = evaluations[-OVERFIT_EVALUATIONS:]
    now = last[-1]
    if any(held.step <= best.step or held.loss <= best.loss + OVERFIT_NATS for held in last):
        return None
    if best.train_loss is None or now.train_loss is None or now.train_loss >= best.train_loss:
        return None
    return Stop(
        reason="over-fitting",
        step=now.step,
        good_step=best.step,
        detail=f"the hold-out's loss rose from {best.loss:.3f} at step {best.step} to "
        f"{now.loss:.3f} at step {now.step}, while the training loss fell from "
        f"{best.train_loss:.3f} to {now.train_loss:.3f}",
        advice=("train for fewer epochs", "bring more rows", "give the adapter a smaller rank"),
    )


def divergence_advice(config: RunConfig, learning_rate: float) -> tuple[str, ...]:
    """Return what to do about a loss that leaps or is no number."""
    advice = [f"a lower --learning-rate, such as {learning_rate / 2:g}"]
    if config.method == "qlora" and config.quant_type == "nf4":
        advice.append('4-bit type "fp4" instead of "nf4"')
    if config.precision == "fp16":
        advice.append('precision "bf16" where the card has it')
    return (*advice, "a longer warm-up (--warmup-steps)")
