"""`Scaling`: what several cards of one kind in one host are expected to come to together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from lora_advisor.probes.prediction import Interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaling:
    """Predicted, never measured: probes run on one card.

    Attributes:
        gpus: Cards that share a step.
        link: What joins them, by the card table; None where it is not known.
        gradient_bytes: What each card sends of its gradients in a step, and what DDP's buckets
            hold.
        all_reduce_s: Seconds that a step takes longer for that; None where the link is not known.
        waiting_s: Seconds that it takes longer because the slowest card is waited for, as one
            card's steps varied; None where they were not measured.
        step_s: Seconds of a step of all cards; None likewise.
        tokens_per_s: Tokens of all cards, padding included, per second; None likewise.
        efficiency: That against so many times what one card does with the same effective batch.
        set_aside_bytes: Memory of each card that the plan leaves to DDP's buckets and to NCCL.
    """

    gpus: int
    link: str | None
    gradient_bytes: int
    all_reduce_s: Interval | None
    step_s: Interval | None
    tokens_per_s: Interval | None
    efficiency: Interval | None
    set_aside_bytes: int
    waiting_s: Interval | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read the JSON form."""
        values = dict(data)
        for name in ("all_reduce_s", "waiting_s", "step_s", "tokens_per_s", "efficiency"):
            values[name] = None if data.get(name) is None else Interval(**data[name])
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return dataclasses.asdict(self)
