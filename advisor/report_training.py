"""A training as text for people: how it stands, and what came of it."""

from __future__ import annotations

from collections.abc import Callable

from tabulate import tabulate

from lora_advisor.advisor.cuts_text import cuts_text
from lora_advisor.advisor.guards import Stop
from lora_advisor.advisor.likelihood import CLEAR_NATS, Likelihood
from lora_advisor.advisor.outcome import Predicted, Progress, TrainingResult
from lora_advisor.advisor.preference_loss import Preference
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
    pairs = result.config.stage == "dpo"
    rows = f"{result.rows:,} {'pairs' if pairs else 'rows'}"
    lines.append(f"{result.steps} steps, {rows}, {result.holdout_rows:,} held out")
    cuts = cuts_text(result, result.config.seq_len, result.config.stage)
    lines += [cuts] if cuts else []
    if result.eval_loss_before is not None and result.eval_loss_after is not None:
        name, unit = ("DPO loss", "") if pairs else ("loss", " (nats a token)")
        lines.append(
            f"held-out {name} {result.eval_loss_before:.3f} before, "
            f"{result.eval_loss_after:.3f} after{unit}"
        )
    if result.likelihood is not None:
        lines.append(_likelihood_line(result.likelihood))
    if result.preference is not None:
        lines += preference_lines(result.preference)
    lines += _note_lines(result)
    headers = ["", "predicted", "measured", "measured against predicted"]
    lines += ["", tabulate(figures(result), headers=headers, disable_numparse=True)]
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


def preference_lines(found: Preference) -> list[str]:
    """Write how the held-out pairs are told apart: the DPO loss, the rewards."""
    drop = f"held-out pairs, each weighing the same: drop of the DPO loss {found.drop:.3f}"
    if found.low is not None and found.high is not None:
        drop += f" (95 % interval {found.low:.3f} to {found.high:.3f})"
    else:
        drop += " (one pair gives no interval)"
    untouched = "" if found.base_accuracy else " (all rewards are 0 before the first step)"
    return [
        drop,
        f"reward accuracy, pairs with chosen above rejected: {found.base_accuracy:.0%} before"
        f"{untouched}, {found.tuned_accuracy:.0%} after",
        f"mean reward after, beta {found.beta:g}: chosen {found.chosen_reward:+.3f}, rejected "
        f"{found.rejected_reward:+.3f}; below 0 an answer has become less likely",
    ]


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


def preference_rows(found: Preference) -> list[list[str]]:
    """Return the same as lines of a table, with more digits."""
    ends = ["unknown" if end is None else f"{end:.4f}" for end in (found.low, found.high)]
    return [
        [
            "its fall, each pair weighing the same (95 % interval)",
            f"{found.drop:.4f} ({ends[0]} to {ends[1]})",
        ],
        [
            "reward accuracy: held-out pairs with chosen above rejected, before and after",
            f"{found.base_accuracy:.1%}, {found.tuned_accuracy:.1%}",
        ],
        [
            f"mean reward after (beta {found.beta:g}): chosen, rejected",
            f"{found.chosen_reward:+.4f}, {found.rejected_reward:+.4f}",
        ],
    ]


def figures(result: TrainingResult) -> list[list[str]]:
    """Return what was promised, what came, and by how much that is off, a line each."""
    measured, predicted = result.measured, result.predicted or Predicted()
    return [
        _figure(
            "tokens/s, padding included",
            predicted.padded_tokens_per_s,
            measured.padded_tokens_per_s,
            lambda speed: f"{speed:,.0f}",
        ),
        _figure(
            "tokens/s without padding", None, measured.tokens_per_s, lambda speed: f"{speed:,.0f}"
        ),
        _figure("peak of the process", predicted.peak_bytes, measured.peak_bytes, gib),
        _figure("time of the steps", predicted.train_seconds, measured.train_seconds, duration),
    ]


def _figure(
    name: str, promised: float | None, came: float | None, write: Callable[[float], str]
) -> list[str]:
    """Return a line of the figures; what is not known is said."""
    return [
        name,
        "unknown" if promised is None else write(promised),
        "not measured" if came is None else write(came),
        f"{came / promised - 1:+.1%}" if promised and came is not None else "unknown",
    ]
