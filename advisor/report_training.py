"""A training as text for people: how it stands, and what came of it."""

from __future__ import annotations

from tabulate import tabulate

from lora_advisor.advisor.guards import Stop
from lora_advisor.advisor.likelihood import CLEAR_NATS, Likelihood
from lora_advisor.advisor.outcome import Progress, TrainingResult
from lora_advisor.advisor.report import duration, gib

#: How each verdict on the hold-out is said.
_VERDICTS = {
    "clear": f"clear: at least {CLEAR_NATS:g} nats, and the interval is above 0",
    "small": f"small: below {CLEAR_NATS:g} nats, but the interval is above 0",
    "none": "none that can be told from chance",
    "worse": "worse: the base model was better",
    "unknown": "unknown: one row gives no interval",
}


def progress_text(state: Progress) -> str:
    """Write how a training stands, in one line."""
    memory = "" if state.peak_bytes is None else f", peak {gib(state.peak_bytes)}"
    power = "" if state.power_w is None else f", {state.power_w:.0f} W"
    return (
        f"step {state.step}/{state.steps}: loss {state.loss:.3f}, "
        f"{state.tokens_per_s:,.0f} tokens/s"
        f"{memory}{power}, {duration(state.seconds_left)} left"
    )


def training_text(result: TrainingResult) -> str:
    """Write what a training came to, predicted beside measured."""
    lines = [] if result.stop is None else [*_stop_lines(result.stop), ""]
    lines.append(f"{result.steps} steps, {result.rows:,} rows, {result.holdout_rows:,} held out")
    if result.eval_loss_before is not None and result.eval_loss_after is not None:
        lines.append(
            f"held-out loss {result.eval_loss_before:.3f} before, "
            f"{result.eval_loss_after:.3f} after (nats a token)"
        )
    if result.likelihood is not None:
        lines.append(_likelihood_line(result.likelihood))
    lines += _note_lines(result)
    lines += ["", _figures(result)]
    lines += ["", f"adapter in {result.adapter}"]
    return "\n".join(lines)


def _stop_lines(stop: Stop) -> list[str]:
    lines = [
        f"stopped, {stop.reason}: {stop.detail}",
        f"the adapter is that of step {stop.kept_step}, the last that is known to be good"
        if stop.reason != "over-fitting"
        else f"the adapter is that of step {stop.kept_step}, the best on the hold-out",
    ]
    return [*lines, f"what may help: {'; '.join(stop.advice)}"]


def _likelihood_line(found: Likelihood) -> str:
    text = (
        f"held-out rows, each weighing the same: {found.base_nats:.3f} nats a token under the base "
        f"model, {found.tuned_nats:.3f} tuned; drop {found.drop_nats:.3f}"
    )
    if found.low_nats is not None and found.high_nats is not None:
        text += f" (95 % interval {found.low_nats:.3f} to {found.high_nats:.3f})"
    return f"{text}; {_VERDICTS[found.verdict]}"


def _note_lines(result: TrainingResult) -> list[str]:
    """Write what else a user must know: each a line, none where there is nothing."""
    lines = [str(recovery) for recovery in result.recoveries]
    known = result.known
    if known is not None and known.flagged:
        left = "left out" if known.dropped else "trained on all the same"
        lines.append(
            f"{known.flagged:,} of {known.checked:,} rows looked at ({known.share:.0%}) have a "
            f"perplexity below {known.threshold:g} under the base model: known by heart, {left}; "
            f"{known.file}"
        )
    if result.overfit is not None and result.stop is None:
        lines.append(f"over-fitting: {result.overfit.detail}")
    return lines


def _figures(result: TrainingResult) -> str:
    measured, predicted = result.measured, result.predicted
    rows = [
        [
            "tokens/s, padding included",
            _number(predicted.padded_tokens_per_s if predicted else None, "unknown"),
            _number(measured.padded_tokens_per_s, "not measured"),
        ],
        ["tokens/s without padding", "unknown", _number(measured.tokens_per_s, "not measured")],
        [
            "peak of the process",
            _size(predicted.peak_bytes if predicted else None, "unknown"),
            _size(measured.peak_bytes, "not measured"),
        ],
        ["time of the steps", "unknown", duration(measured.train_seconds)],
    ]
    return tabulate(rows, headers=["", "predicted", "measured"], disable_numparse=True)


def _number(value: float | None, none: str) -> str:
    return none if value is None else f"{value:,.0f}"


def _size(value: int | None, none: str) -> str:
    return none if value is None else gib(value)
