"""How well a model tells the held-out pairs apart: DPO loss and rewards, pair by pair.

An answer's reward is beta times by how much likelier the adapter makes it (log-likelihood of all
its tokens, in nats) than the reference, which is the model without the adapter. The DPO loss of a
pair is -log sigmoid(reward of chosen - reward of rejected): ln 2 where nothing was learnt.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from lora_advisor.advisor.likelihood import mean_interval


@dataclass(frozen=True, kw_only=True)
class PairRewards:
    """Rewards of pairs under one model.

    Attributes:
        chosen: Reward of the answer to prefer, of each pair.
        rejected: Reward of the answer to avoid.
        beta: What the rewards were scaled with.
    """

    chosen: tuple[float, ...] = field(repr=False)
    rejected: tuple[float, ...] = field(repr=False)
    beta: float

    @property
    def losses(self) -> tuple[float, ...]:
        """DPO loss of each pair."""
        return tuple(
            _softplus(rejected - chosen)
            for chosen, rejected in zip(self.chosen, self.rejected, strict=True)
        )

    @property
    def loss(self) -> float:
        """Mean DPO loss of a pair."""
        return _mean(self.losses)

    @property
    def accuracy(self) -> float:
        """Share of the pairs whose chosen answer has the higher reward; an equal one is none."""
        return _mean(
            [float(good > bad) for good, bad in zip(self.chosen, self.rejected, strict=True)]
        )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"chosen": list(self.chosen), "rejected": list(self.rejected), "beta": self.beta}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read the JSON form."""
        return cls(
            chosen=tuple(data["chosen"]), rejected=tuple(data["rejected"]), beta=data["beta"]
        )


@dataclass(frozen=True, kw_only=True)
class Preference:
    """The model as it came and the tuned one on the same held-out pairs.

    Attributes:
        pairs: Pairs compared.
        beta: Scale of the rewards.
        base_loss: Mean DPO loss of a pair before the first step.
        tuned_loss: The same under the tuned model.
        drop: By how much it fell.
        low: Lower end of the drop's 95 % interval, by a bootstrap over the pairs, each with both
            its losses; None for fewer than two pairs.
        high: Its upper end.
        base_accuracy: Share of the pairs whose chosen answer has the higher reward, before the
            first step: 0 where adapter and reference agree, for all rewards are 0 then.
        tuned_accuracy: The same under the tuned model.
        chosen_reward: Mean reward of the chosen answers under the tuned model: below 0 they have
            become less likely.
        rejected_reward: Mean reward of the rejected ones.
    """

    pairs: int
    beta: float
    base_loss: float
    tuned_loss: float
    drop: float
    low: float | None
    high: float | None
    base_accuracy: float
    tuned_accuracy: float
    chosen_reward: float
    rejected_reward: float

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return dataclasses.asdict(self)


def compare_pairs(base: PairRewards, tuned: PairRewards) -> Preference:
    """Compare two models pair by pair."""
    drops = [before - after for before, after in zip(base.losses, tuned.losses, strict=True)]
    low, high = mean_interval(drops)
    return Preference(
        pairs=len(drops),
        beta=tuned.beta,
        base_loss=base.loss,
        tuned_loss=tuned.loss,
        drop=_mean(drops),
        low=low,
        high=high,
        base_accuracy=base.accuracy,
        tuned_accuracy=tuned.accuracy,
        chosen_reward=_mean(tuned.chosen),
        rejected_reward=_mean(tuned.rejected),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _softplus(value: float) -> float:
    """Return log(1 + e^value)."""
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))
