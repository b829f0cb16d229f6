"""How much likelier the tuned model makes the held-out answers: per row, with an interval."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

#: A fall of the mean by so many nats a token is called clear.
CLEAR_NATS = 0.5

#: Resamples of the bootstrap, and its seed: the same rows give the same interval.
_RESAMPLES, _SEED = 10_000, 0

#: Row numbers drawn at once, so that memory stays at some ten MB.
_DRAWN = 1_000_000


@dataclass(frozen=True, kw_only=True)
class RowLosses:
    """Losses of rows under one model.

    Attributes:
        nats: Mean negative log-likelihood of the trained tokens of each row.
        tokens: How many trained tokens each has.
    """

    nats: tuple[float, ...] = field(repr=False)
    tokens: tuple[int, ...] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"nats": list(self.nats), "tokens": list(self.tokens)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read the JSON form."""
        return cls(nats=tuple(data["nats"]), tokens=tuple(data["tokens"]))


def of_whole_rows(losses: RowLosses, sources: Sequence[int]) -> RowLosses:
    """Return the losses of whole rows from those of their pieces.

    Pieces of one row are no independent witnesses: an interval over them would be too narrow.

    Args:
        losses: Of pieces.
        sources: Which row each of them is of.
    """
    nats: dict[int, float] = {}
    tokens: dict[int, int] = {}
    for source, mean, count in zip(sources, losses.nats, losses.tokens, strict=True):
        nats[source] = nats.get(source, 0.0) + mean * count
        tokens[source] = tokens.get(source, 0) + count
    return RowLosses(
        nats=tuple(nats[source] / tokens[source] for source in nats), tokens=tuple(tokens.values())
    )


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Base and tuned model on the same held-out rows; every row weighs the same.

    Attributes:
        rows: Rows compared.
        base_nats: Mean over the rows of their mean negative log-likelihood a trained token, in
            nats, under the model as it came.
        tuned_nats: The same under the tuned model.
        drop_nats: By how much it fell.
        low_nats: Lower end of the drop's 95 % interval, by a bootstrap over the rows; None for
            fewer than two rows.
        high_nats: Its upper end.
        verdict: "clear" (a drop of at least `CLEAR_NATS`, the interval above 0), "small" (the
            interval above 0), "none" (the interval holds 0), "worse" (it lies below 0), or
            "unknown" without an interval.
    """

    rows: int
    base_nats: float
    tuned_nats: float
    drop_nats: float
    low_nats: float | None
    high_nats: float | None
    verdict: str

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return dataclasses.asdict(self)


def compare_rows(base: RowLosses, tuned: RowLosses) -> Likelihood:
    """Compare two models row by row."""
    drops = [before - after for before, after in zip(base.nats, tuned.nats, strict=True)]
    low, high = mean_interval(drops)
    return Likelihood(
        rows=len(drops),
        base_nats=sum(base.nats) / len(drops),
        tuned_nats=sum(tuned.nats) / len(drops),
        drop_nats=sum(drops) / len(drops),
        low_nats=low,
        high_nats=high,
        verdict=_verdict(sum(drops) / len(drops), low, high),
    )


def _verdict(drop: float, low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return "unknown"
    if low > 0:
        return "clear" if drop >= CLEAR_NATS else "small"
    return "worse" if high < 0 else "none"


def mean_interval(drops: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the 95 % percentile interval of the mean: rows are drawn, each with both its losses.

    Drawing the differences, not the losses of each model, leaves out how rows differ in difficulty.
    There is none for fewer than two.
    """
    if len(drops) < 2:
        return None, None
    import numpy
    from scipy import stats

    found = stats.bootstrap(
        (drops,), numpy.mean, n_resamples=_RESAMPLES, batch=max(1, _DRAWN // len(drops)),
        method="percentile", confidence_level=0.95, rng=_SEED,
    )  # fmt: skip
    low, high = found.confidence_interval
    return float(low), float(high)
