"""Seconds of a configuration's micro-batches at any length, from a predictor and its probes."""

from __future__ import annotations

from lora_advisor.advisor.epochs import MicroSeconds, WorkByLength, data_report
from lora_advisor.advisor.predictor import Predictor
from lora_advisor.advisor.probing import expected_speed
from lora_advisor.advisor.session import Session
from lora_advisor.probes.batching import batching_of
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.plan import DataSummary
from lora_advisor.probes.prediction import Interval


def off_by(session: Session, config: RunConfig) -> float:
    """Return by how much the models are off where they were measured; 1 where they were not."""
    time_, speed = session.predictor.time(config), expected_speed(session, config)
    if time_ is None or speed is None:
        return 1.0
    return config.tokens_per_step / speed / time_.value


def prices_of(predictor: Predictor, planned: RunConfig, factor: float = 1.0) -> MicroSeconds:
    """Return what prices micro-batches of a configuration and of those that differ in little.

    Args:
        predictor: The models.
        planned: The configuration; its sequence length is the longest that is asked for.
        factor: As `off_by` returns it.
    """
    full = planned.seq_len
    works = WorkByLength(predictor.work, full)

    def micro_seconds(config: RunConfig) -> Interval | None:
        packed = config.packing and not planned.packing
        if packed and predictor.predict(config.replace(seq_len=full)).verdict == "does not fit":
            return None
        time_ = predictor.time_of(config, works)
        return None if time_ is None else time_.interval.scaled(factor / config.accumulation)

    return micro_seconds


def pass_seconds(
    data: DataSummary, config: RunConfig, micro_seconds: MicroSeconds, *, seed: int
) -> Interval | None:
    """Return the time of one pass over the data as a configuration makes its micro-batches."""
    own = (batching_of(config),)
    (batching,) = data_report(
        data, config, micro_seconds, seed=seed, names=own, packed_attention=config.attention
    )
    return batching.seconds
