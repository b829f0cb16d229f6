"""What would make a long training shorter, each with its time: fewer passes, less, or another card.

Nothing here is done unasked: a plan only tells it.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path

from lora_advisor.advisor.data_cuttings import LENGTHS
from lora_advisor.advisor.datafit import shortened
from lora_advisor.advisor.epochs import MicroSeconds, traced_lengths
from lora_advisor.advisor.pricing import off_by, pass_seconds, prices_of
from lora_advisor.advisor.renting import rentals
from lora_advisor.advisor.session import Session
from lora_advisor.probes.errors import AdvisorError
from lora_advisor.probes.plan import DataSummary, Plan
from lora_advisor.probes.saving import Saving

#: A training is long above so many seconds of one pass, or of all.
LONG_PASS_S, LONG_TRAINING_S = 6 * 3600.0, 12 * 3600.0

#: What the user gives for other ways to make micro-batches than in random order.
BATCHING_OPTIONS = {"grouped": "--group-by-length", "packed": "--packing"}
#: Shorter sequences that are set beside the planned one.
_SHORTER = 2
#: The rank is halved down to this, no further.
_LEAST_RANK = 4

#: Optimizer steps below which a smaller effective batch is proposed where the user named none, and
#: what is proposed. A rule of thumb: the warm-up (advisor/schedule.py) then has five steps of its
#: own, and what follows is still most of the training.
_FEW_STEPS, _SMALLER_BATCHES = 100, (12, 8, 4)


def is_long(plan: Plan) -> bool:
    """Return whether a plan's training is so long that what would cut it is told."""
    seconds = plan.epoch_s
    if seconds is None:
        return False
    return seconds > LONG_PASS_S or seconds * plan.spec.epochs > LONG_TRAINING_S


def with_savings(session: Session, plan: Plan) -> Plan:
    """Return a plan with the effective batch its data suggests, and what would shorten it.

    Cards for rent are priced where the training is long, or the user has brought prices.
    """
    if plan.batching is None or plan.batching.seconds is None or plan.data is None:
        return plan
    changes: dict[str, object] = {"proposed_batch": _proposed_batch(plan)}
    if is_long(plan):
        session.say("a long training: pricing what would make it shorter")
        changes["savings"] = tuple(_savings(session, plan, plan.data))
    if is_long(plan) or session.prices is not None:
        session.say("pricing cards for rent")
        changes["rentals"] = rentals(session, plan, plan.data)
    changes["wall_s"] = time.monotonic() - session.started
    return dataclasses.replace(plan, **changes)  # type: ignore[arg-type]


def _proposed_batch(plan: Plan) -> int | None:
    """Return a smaller effective batch where this one, which nobody named, leaves few steps."""
    spec = plan.spec
    if spec.batch_named or steps_with(plan, spec.effective_batch) >= _FEW_STEPS:
        return None
    smaller = [size for size in _SMALLER_BATCHES if size < spec.effective_batch]
    enough = (size for size in smaller if steps_with(plan, size) >= _FEW_STEPS)
    return next(enough, smaller[-1] if smaller else None)


def steps_with(plan: Plan, effective_batch: int) -> int:
    """Return the optimizer steps of a plan's training with another effective batch."""
    assert plan.batching is not None
    sequences = plan.batching.micro_batches * plan.chosen.config.micro_batch
    return round(math.ceil(sequences / effective_batch) * plan.spec.epochs)


def _savings(session: Session, plan: Plan, data: DataSummary) -> Iterator[Saving]:
    """Yield what would be shorter on the planned card, the gentlest first."""
    spec, config = plan.spec, plan.chosen.config
    assert plan.batching is not None and plan.batching.seconds is not None
    seconds = plan.batching.seconds
    if spec.epochs > 1:
        fewer = max(1, min(math.ceil(spec.epochs) - 1, int(LONG_TRAINING_S / seconds.value)))
        yield Saving(option=f"--epochs {fewer}", seconds=seconds.scaled(fewer))
    for batching in plan.batchings:
        option = BATCHING_OPTIONS.get(batching.name)
        if option and batching.seconds is not None and batching.seconds.value < seconds.value:
            yield Saving(option=option, seconds=batching.seconds.scaled(spec.epochs))
    prices = prices_of(session.predictor, config, off_by(session, config))
    yield from _with_lower_rank(session, plan, data, prices)
    yield from _with_shorter_rows(session, plan, data, prices)


def _with_lower_rank(
    session: Session, plan: Plan, data: DataSummary, prices: MicroSeconds
) -> Iterator[Saving]:
    config = plan.chosen.config
    if config.lora is None or config.lora.r < 2 * _LEAST_RANK:
        return
    rank = config.lora.r // 2
    lower = config.replace(lora=dataclasses.replace(config.lora, r=rank))
    lengths = traced_lengths(config.seq_len)
    session.predictor.store.prepare(lower.replace(seq_len=length) for length in lengths)
    seconds = pass_seconds(data, lower, prices, seed=plan.spec.seed)
    if seconds is not None:
        yield Saving(option=f"--rank {rank}", seconds=seconds.scaled(plan.spec.epochs))


def _with_shorter_rows(
    session: Session, plan: Plan, data: DataSummary, prices: MicroSeconds
) -> Iterator[Saving]:
    """Yield shorter sequences, with the rows that each cuts or leaves out."""
    config, spec = plan.chosen.config, plan.spec
    if config.stage != "sft":
        return
    lengths = [n for n in LENGTHS if n < config.seq_len][-_SHORTER:] or [config.seq_len // 2]
    try:
        cut = shortened(Path(data.path), plan.architecture, lengths, long_rows=spec.long_rows)
    except AdvisorError as error:  # the plan is not lost with data that has gone since
        session.say(f"shorter sequences are not priced: {error}")
        return
    for length in reversed(lengths):
        if length not in cut:
            continue
        left, shorter = cut[length], config.replace(seq_len=length)
        seconds = pass_seconds(left, shorter, prices, seed=spec.seed)
        if seconds is not None:
            yield Saving(
                option=f"--seq {length}",
                seconds=seconds.scaled(spec.epochs),
                truncated=left.truncated,
                split=left.split,
                left_out=left.long_dropped + left.dropped,
                lost_tokens=data.tokens - left.tokens,
            )
