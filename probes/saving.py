"""What would make a training shorter, as a plan tells it: a smaller wish, or a rented card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.prediction import Interval


@dataclass(frozen=True, kw_only=True)
class Saving:
    """A change of what was asked for, and how long the training would then take.

    Attributes:
        option: What the user gives, such as "--epochs 1".
        seconds: Time of all passes, on the planned card.
        truncated: Rows that would be cut to the sequence length.
        split: Rows that would become several.
        left_out: Rows that would be left out.
        lost_tokens: Tokens of a pass that would be lost, of those trained on as planned.
    """

    option: str
    seconds: Interval
    truncated: int = 0
    split: int = 0
    left_out: int = 0
    lost_tokens: int = 0

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read the JSON form."""
        return cls(**{**data, "seconds": Interval(**data["seconds"])})


@dataclass(frozen=True, kw_only=True)
class Rental:
    """What the training would take and cost on a card for rent: predicted, never measured.

    Attributes:
        card: Its key in the card table.
        name: The maker's name.
        config: What would run there.
        seconds: Time of all passes; setting up and evaluating are not counted.
        usd: What that costs.
        usd_per_hour: Price of an hour.
        date: When it was that.
        source: Who said so.
    """

    card: str
    name: str
    config: RunConfig
    seconds: Interval
    usd: Interval
    usd_per_hour: float
    date: str
    source: str

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read the JSON form."""
        read = {name: Interval(**data[name]) for name in ("seconds", "usd")}
        return cls(**{**data, **read, "config": RunConfig.from_json(data["config"])})
