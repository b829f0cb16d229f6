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
from lora_advisor.probes.saving import Saving


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
        parts += [f"{how_long(plan)}; what would make it shorter:",
                  _set(savings_rows(plan), SAVINGS_HEADERS)]  # fmt: skip
    if plan.rentals:
        parts += [f"on a rented card, {RENTING}:", _set(rental_rows(plan), RENTAL_HEADERS),
                  _prices(plan)]  # fmt: skip
    elif plan.savings:
        parts.append(NO_RENTAL)
    return "\n\n".join(parts) or None


def _set(rows: list[tuple[str, ...]], headers: tuple[str, ...]) -> str:
    return tabulate(rows, headers=headers, disable_numparse=True)


#: Columns of `savings_rows` and of `rental_rows`.
SAVINGS_HEADERS = ("with", "the training takes", "", "and in return")
RENTAL_HEADERS = ("card", "what runs there", "the training takes", "and costs", "an hour")
#: How the figures of rented cards are known, why there are none, and what else can be asked.
RENTING = (
    "predicted from a trace of the step there, not measured (setting up and evaluating not counted)"
)
NO_RENTAL = "no card of the price list is larger than this one and expected to be faster"
OTHER_PRICES = "--prices FILE takes yours; --gpu NAME plans for a card itself and may find better"

#: What comes with another way to make micro-batches.
_BATCHINGS = {
    "--group-by-length": "rows of like length share a step",
    "--packing": "several rows share a sequence: fewer, larger steps",
}


def how_long(plan: Plan) -> str:
    """Say why the training counts as long."""
    if (plan.epoch_s or 0.0) > LONG_PASS_S:
        return f"an epoch takes more than {duration(LONG_PASS_S)}"
    return f"all epochs take more than {duration(LONG_TRAINING_S)}"


def savings_rows(plan: Plan) -> list[tuple[str, ...]]:
    """Return a row of words for each change that would make the training shorter."""
    if not plan.savings:
        return []
    assert plan.batching is not None and plan.batching.seconds is not None
    now = plan.batching.seconds.value * plan.spec.epochs
    return [
        (
            saving.option,
            time_text(saving.seconds),
            _less(saving.seconds.value / now),
            _price_of(saving, plan),
        )
        for saving in plan.savings
    ]


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


def rental_rows(plan: Plan) -> list[tuple[str, ...]]:
    """Return a row of words for each card for rent."""
    return [
        (
            rental.card,
            describe(rental.config),
            time_text(rental.seconds),
            _usd(rental.usd),
            f"${rental.usd_per_hour:.2f}",
        )
        for rental in plan.rentals
    ]


def _usd(usd: Interval) -> str:
    return f"${usd.value:,.2f} (${usd.low:,.2f} to ${usd.high:,.2f})"


def price_rows(plan: Plan) -> list[tuple[str, ...]]:
    """Return of each card for rent when its price was what it is, and who said so."""
    return [(rental.card, rental.date, rental.source) for rental in plan.rentals]


def _prices(plan: Plan) -> str:
    dated = [f"{card} as of {date}: {source}" for card, date, source in price_rows(plan)]
    return "\n".join([f"where the prices are from ({OTHER_PRICES}):", *dated])
