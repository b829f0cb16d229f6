"""How long the steps of a training should take: a plan's time of a token, times the tokens to come.

A plan prices the lengths of its own data; the tokens are those of the rows that are trained on,
padding included, as the trainer's micro-batches hold them. So a hold-out, `max_steps` and data of
other lengths count as they are. What the plan did not price is taken from its speed on full rows.
"""

from __future__ import annotations

import dataclasses

from lora_advisor.advisor.job import Job
from lora_advisor.advisor.lengths import epoch_of
from lora_advisor.advisor.outcome import Predicted
from lora_advisor.advisor.processes import here
from lora_advisor.probes.arguments import padding_multiple
from lora_advisor.probes.batching import batching_of
from lora_advisor.probes.plan import Plan
from lora_advisor.probes.preference import row_length


def seconds_per_token(plan: Plan) -> float | None:
    """Return a plan's time of a token, padding included; None where it knows none."""
    priced = plan.batching
    if priced is not None and priced.seconds is not None:
        return priced.seconds.value / priced.computed_tokens
    speed = plan.tokens_per_s
    return None if not speed else 1 / speed


def promised(plan: Plan) -> Predicted:
    """Return what a plan promises of the training it is for."""
    ran = plan.chosen.measured
    memory = plan.chosen.prediction.memory
    return Predicted(
        padded_tokens_per_s=plan.tokens_per_s,
        peak_bytes=memory.process_bytes if ran is None else ran.process_bytes,
        seconds_per_token=seconds_per_token(plan),
        start_seconds=None if ran is None else ran.start_s,
    )


def with_train_seconds(predicted: Predicted | None, job: Job, *, steps: int) -> Predicted | None:
    """Return what was promised with the time of so many steps, where it follows from the rest."""
    if predicted is None or predicted.train_seconds is not None:
        return predicted
    if predicted.seconds_per_token is None:
        return predicted
    seconds = predicted.seconds_per_token * tokens_per_step(job) * steps
    seconds += predicted.start_seconds or 0.0
    return dataclasses.replace(predicted, train_seconds=seconds)


def tokens_per_step(job: Job) -> float:
    """Return the tokens of a planned optimizer step, padding included: the mean of a pass."""
    config = job.config
    rows = [row for at, row in enumerate(job.ready.train) if at not in job.known_rows]
    epoch = epoch_of(
        [row_length(row) for row in rows],
        batching_of(config),
        seq_len=config.seq_len,
        micro_batch=config.micro_batch,
        accumulation=config.accumulation * here().size,
        seed=job.settings.seed,
        sequences=config.sequences // config.micro_batch,
        multiple=padding_multiple(config) or 1,
    )
    return epoch.computed_tokens / epoch.optimizer_steps
