"""How long the training of a plan takes, and what would make it shorter, as text for people."""

from __future__ import annotations

from tabulate import tabulate

from lora_advisor.advisor.arms import describe
from lora_advisor.advisor.cuts_text import cuts_text
from lora_advisor.advisor.report import duration, time_text
from lora_advisor.advisor.report_data import percent
from lora_advisor.advisor.savings import LONG_PASS_S, LONG_TRAINING_S, steps_with
from lora_advisor.probes.plan import Plan
from lora_advisor.probes.prediction import Interval
from lora_advisor.probes.saving import Rental, Saving


def data_lines(plan: Plan) -> list[str]:
    """Write what the data holds and how long it takes; nothing where that is not known."""
    data, epoch_s, epochs = plan.data, plan.epoch_s, plan.spec.epochs
    if data is None or epoch_s is None:
        return []
    name = "pairs" if data.sequences > 1 else "rows"
    seconds = None if plan.batching is None else plan.batching.seconds

    def told(passes: float) -> str:
        return duration(epoch_s * passes) if seconds is None else time_text(seconds.scaled(passes))

    line = f"your data: {data.rows:,} {name}, {data.tokens:,} tokens; one epoch {told(1)}"
    lines = [line if epochs == 1 else f"{line}, {epochs:g} epochs {told(epochs)}"]
    cuts = cuts_text(data, plan.chosen.config.seq_len, plan.chosen.config.stage)
    lines += [f"long rows: {cuts}"] if cuts else []
    return lines + _batch_lines(plan)


def _batch_lines(plan: Plan) -> list[str]:
    """Write the effective batch that the data suggests, where it suggests another."""
    if plan.proposed_batch is None or plan.batching is None:
        return []
    now, then = plan.spec.effective_batch, plan.proposed_batch
    few, more = steps_with(plan, now), steps_with(plan, then)
    return [
        f"{few:,} optimizer {'step' if few == 1 else 'steps'} of {now} are few to learn from: "
        f"--batch {then} would make {more:,} (a rule of thumb; it stays {now} unless you give it)"
    ]


def savings_text(plan: Plan) -> str | None:
    """Write what would make a long training shorter, and what larger cards cost; None for less."""
    parts = []
    if plan.savings:
        parts += [f"{_how_long(plan)}; what would make it shorter:", _savings_table(plan)]
    if plan.rentals:
        parts += [_RENTING, _rentals_table(plan.rentals), _prices(plan.rentals)]
    elif plan.savings:
        parts.append("no card of the price list is larger than this one and expected to be faster")
    return "\n\n".join(parts) or None


_RENTING = (
    "on a rented card, predicted from a trace of the step there, not measured (setting up and "
    "evaluating not counted):"
)


#: What comes with another way to make micro-batches.
_BATCHINGS = {
    "--group-by-length": "rows of like length share a step",
    "--packing": "several rows share a sequence: fewer, larger steps",
}


def _how_long(plan: Plan) -> str:
    if (plan.epoch_s or 0.0) > LONG_PASS_S:
        return f"an epoch takes more than {duration(LONG_PASS_S)}"
    return f"all epochs take more than {duration(LONG_TRAINING_S)}"


def _savings_table(plan: Plan) -> str:
    assert plan.batching is not None and plan.batching.seconds is not None
    now = plan.batching.seconds.value * plan.spec.epochs
    rows = [
        [
            saving.option,
            time_text(saving.seconds),
            _less(saving.seconds.value / now),
            _price_of(saving, plan),
        ]
        for saving in plan.savings
    ]
    headers = ["with", "the training takes", "", "and in return"]
    return tabulate(rows, headers=headers, disable_numparse=True)


def _less(share: float) -> str:
    if abs(1 - share) < 0.005:
        return "as long"
    return f"{percent(abs(1 - share))} {'less' if share < 1 else 'more'}"


def _price_of(saving: Saving, plan: Plan) -> str:
    """Write what a saving gives up."""
    if saving.option in _BATCHINGS:
        return _BATCHINGS[saving.option]
    if saving.option.startswith("--epochs"):
        return f"fewer passes than {plan.spec.epochs:g}"
    if saving.option.startswith("--rank"):
        return "an adapter with half the weights"
    assert plan.data is not None
    counts = (("cut", saving.truncated), ("split", saving.split), ("left out", saving.left_out))
    parts = [f"{count:,} {'row' if count == 1 else 'rows'} {what}" for what, count in counts
             if count]  # fmt: skip
    if saving.lost_tokens > 0:
        parts.append(f"{percent(saving.lost_tokens / plan.data.tokens)} of the tokens lost")
    return ", ".join(parts) or "nothing: no row is longer"


def _rentals_table(rentals: tuple[Rental, ...]) -> str:
    rows = [
        [
            rental.card,
            describe(rental.config),
            time_text(rental.seconds),
            _usd(rental.usd),
            f"${rental.usd_per_hour:.2f}",
        ]
        for rental in rentals
    ]
    headers = ["card", "what runs there", "the training takes", "and costs", "an hour"]
    return tabulate(rows, headers=headers, disable_numparse=True)


def _usd(usd: Interval) -> str:
    return f"${usd.value:,.2f} (${usd.low:,.2f} to ${usd.high:,.2f})"


def _prices(rentals: tuple[Rental, ...]) -> str:
    dated = [f"{rental.card} as of {rental.date}: {rental.source}" for rental in rentals]
    return "\n".join(
        [
            "where the prices are from (--prices FILE takes yours; --gpu NAME plans for a card "
            "itself and may find better):",
            *dated,
        ]
    )
