"""A training in words: how it stands or ended, as figures and sentences of a report."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lora_advisor.advisor.outcome import Measured, Predicted, TrainingResult
from lora_advisor.advisor.page_numbers import Fact
from lora_advisor.advisor.page_source import Run, Source
from lora_advisor.advisor.report import duration, gib
from lora_advisor.advisor.report_training import preference_lines

#: How each verdict on the hold-out is said.
_VERDICTS = {
    "clear": "a clear gain", "small": "a small gain", "none": "not to be told from chance",
    "worse": "worse than the base model", "unknown": "one row gives no interval",
}  # fmt: skip


def predicted_of(source: Source) -> Predicted | None:
    """Return what the training was promised: by its result, else by its plan."""
    run, plan = source.run, source.plan
    if run is not None and run.result is not None:
        return run.result.predicted
    if plan is None:
        return None
    chosen = plan.chosen
    ran = chosen.measured
    held = chosen.prediction.memory.process_bytes
    if ran is not None and ran.process_bytes is not None:
        held = ran.process_bytes
    return Predicted(padded_tokens_per_s=chosen.tokens_per_s, peak_bytes=held)


def status_text(run: Run) -> tuple[str, str]:
    """Say how a training stands: a sentence, and "good", "doubt" or "bad"."""
    result = run.result
    if result is not None and result.stop is None:
        return f"The training went through: {result.steps:,} steps, {result.rows:,} rows.", "good"
    if result is not None and result.stop is not None:
        stop = result.stop
        kind = "doubt" if stop.reason == "over-fitting" else "bad"
        return (
            f"A guard ended the training, {stop.reason}: {stop.detail}; the adapter is that of "
            f"step {stop.kept_step}.", kind,
        )  # fmt: skip
    if not run.points:
        return "The training has not ended, and has reported nothing yet.", "doubt"
    last = run.points[-1]
    return (
        f"The training had not ended when this report was made: step {last.step:,} of "
        f"{last.steps:,}. What follows is what there is.", "doubt",
    )  # fmt: skip


def run_facts(source: Source) -> list[Fact]:
    """Return what a training came to, or how far it is, in figures."""
    run = source.run
    if run is None:
        return []
    if run.result is not None:
        return _ended(run.result)
    if not run.points:
        return []
    last = run.points[-1]
    facts = [
        Fact(name="Steps done", value=f"{last.step:,} of {last.steps:,}", known="measured",
             note=f"{duration(last.seconds_left)} left at the last pace"),
        Fact(name="Tokens/s", value=f"{last.padded_tokens_per_s:,.0f}", known="measured",
             note="of the last steps, padding included"),
        Fact(name="Training loss", value=_loss(last.loss), known="measured",
             note=f"after step {last.step:,}"),
    ]  # fmt: skip
    if last.peak_bytes is not None:
        facts.append(Fact(name="Peak memory", value=gib(last.peak_bytes), known="measured",
                          note="of the whole process, so far"))  # fmt: skip
    return facts


def _loss(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "no number"


def _ended(result: TrainingResult) -> list[Fact]:
    measured = result.measured
    before, after = result.eval_loss_before, result.eval_loss_after
    facts = []
    if before is not None and after is not None:
        facts.append(
            Fact(name="Held-out loss", value=f"{before:.3f} → {after:.3f}", known="measured",
                 note=_gain(result))
        )  # fmt: skip
    facts += _speed_and_memory(result, measured)
    facts.append(Fact(name="Time of the steps", value=duration(measured.train_seconds),
                      known="measured", note=f"{result.steps:,} steps"))  # fmt: skip
    return facts


def _gain(result: TrainingResult) -> str:
    found = result.likelihood
    if found is None:
        return f"{result.holdout_rows:,} held out"
    interval = ""
    if found.low_nats is not None and found.high_nats is not None:
        interval = f" ({found.low_nats:.3f} to {found.high_nats:.3f})"
    return f"fell by {found.drop_nats:.3f} nats{interval}: {_VERDICTS[found.verdict]}"


def _speed_and_memory(result: TrainingResult, measured: Measured) -> list[Fact]:
    facts = []
    promised = result.predicted
    if measured.padded_tokens_per_s is not None:
        speed = None if promised is None else promised.padded_tokens_per_s
        note = "padding included" if speed is None else f"predicted {speed:,.0f}"
        facts.append(Fact(name="Tokens/s", value=f"{measured.padded_tokens_per_s:,.0f}",
                          known="measured", note=note))  # fmt: skip
    if measured.peak_bytes is not None:
        peak = None if promised is None else promised.peak_bytes
        note = "of the whole process" if peak is None else f"predicted {gib(peak)}"
        facts.append(Fact(name="Peak memory", value=gib(measured.peak_bytes), known="measured",
                          note=note))  # fmt: skip
    return facts


def notes_of(run: Run) -> list[str]:
    """Return what else there is to know of a training, a sentence each."""
    found: list[str] = []
    result = run.result
    if result is not None:
        if result.preference is not None:
            found += preference_lines(result.preference)
        if result.known is not None and result.known.flagged:
            found.append(
                f"{result.known.flagged:,} of {result.known.checked:,} rows looked at were known "
                "by heart to the base model"
            )
        if result.resumed_from_step is not None:
            found.append(f"it went on from step {result.resumed_from_step:,} after an interruption")
        if result.stop is not None:
            found.append("what may help: " + "; ".join(result.stop.advice))
    return found


def events_rows(run: Run) -> Sequence[tuple[str, str, str]]:
    """Return what happened while it trained: after which step, what, and the sentence."""
    return [(f"{step:,}", event, words) for step, event, words in run.events]
