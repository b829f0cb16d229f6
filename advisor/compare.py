"""Full fine-tuning, LoRA and QLoRA side by side, stage by stage of a step."""

from __future__ import annotations

from dataclasses import dataclass

from lora_advisor.advisor.predictor import Predictor
from lora_advisor.probes.config import METHODS, RunConfig
from lora_advisor.probes.machine import Machine
from lora_advisor.probes.prediction import Prediction

#: The order of the columns, what needs most first.
ORDER = ("full", "lora", "qlora")
assert set(ORDER) == set(METHODS)
#: Stages of a step, in their order.
STAGES = ("load", "forward", "loss", "backward", "optimizer")


@dataclass(frozen=True, kw_only=True)
class Column:
    """What one method needs.

    Attributes:
        method: "full", "lora" or "qlora".
        config: The configuration.
        prediction: What is expected of it.
        peak_stage: The stage with the largest peak.
        trainable: Number of trained parameters.
    """

    method: str
    config: RunConfig
    prediction: Prediction
    peak_stage: str
    trainable: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The methods side by side.

    Attributes:
        machine: The card.
        limit_bytes: What the process may hold on it.
        columns: One a method.
    """

    machine: Machine
    limit_bytes: int
    columns: tuple[Column, ...]


def compare(configs: list[RunConfig], predictor: Predictor) -> Comparison:
    """Predict the methods' memory and speed."""
    predictor.prepare(configs)
    return Comparison(
        machine=predictor.machine,
        limit_bytes=predictor.limit_bytes,
        columns=tuple(_column(config, predictor) for config in configs),
    )


def _column(config: RunConfig, predictor: Predictor) -> Column:
    prediction = predictor.predict(config)
    phases = prediction.memory.phases
    return Column(
        method=config.method,
        config=config,
        prediction=prediction,
        peak_stage=max(phases, key=lambda stage: phases[stage]),
        trainable=predictor.store.get(config).trainable,
    )
