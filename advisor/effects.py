"""What each factor does, everything else equal: paired ratios and differences with intervals.

Two runs are a pair when they differ in one factor only and belong to the same repeat. The mean over
the conditions that both levels were measured under is the effect; how the pairs of one condition
scatter gives its interval, and how the conditions differ is shown as a range of its own: an
interval answers "would it come out again", the range "does it depend on the rest".
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

#: Figures whose effect is a ratio, and those whose effect is a difference.
RATIOS = ("tokens_per_s", "joules_per_token")
DIFFERENCES = ("allocated_bytes", "reserved_bytes", "process_bytes")
#: Share of intervals that hold the true value.
LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One run that counts.

    Attributes:
        levels: One level a factor.
        block: The repeat it belongs to.
        values: What was measured, by name; a figure that is unknown is left out.
    """

    levels: tuple[str, ...]
    block: int
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """How many times as much.

    Attributes:
        value: The ratio.
        low: Lower end of its 95 % interval; None where there is nothing to tell it from.
        high: Upper end.
    """

    value: float
    low: float | None
    high: float | None

    @classmethod
    def of_log(cls, mean: float, half: float | None) -> Estimate:
        """Return the ratio whose logarithm is known, with half the width of its interval."""
        if half is None:
            return cls(value=math.exp(mean), low=None, high=None)
        return cls(value=math.exp(mean), low=math.exp(mean - half), high=math.exp(mean + half))


@dataclass(frozen=True, kw_only=True)
class Ratio(Estimate):
    """The geometric mean of ratios over the conditions.

    Attributes:
        smallest: The smallest of a condition.
        largest: The largest.
        basis: What the interval comes from: "repeats", "conditions", or "none".
    """

    smallest: float
    largest: float
    basis: str


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How many bytes more, mean and range over the conditions."""

    mean: float
    smallest: float
    largest: float


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What it does to take one level of a factor instead of another.

    Attributes:
        factor: Its name.
        level: The one.
        against: The other.
        conditions: Combinations of the other factors under which both were measured.
        of_conditions: Combinations there are.
        pairs: Pairs of runs.
        ratios: By figure, of RATIOS.
        differences: By figure, of DIFFERENCES.
        modelled: The ratio of tokens/s by the model of all factors; None where it tells none.
    """

    factor: str
    level: str
    against: str
    conditions: int
    of_conditions: int
    pairs: int
    ratios: Mapping[str, Ratio]
    differences: Mapping[str, Difference]
    modelled: Estimate | None = None


#: Pairs of one comparison by condition: what was measured with the level, and with the other.
Pairs = dict[tuple[str, ...], list[tuple[Mapping[str, float], Mapping[str, float]]]]


def pairs_of(observations: Sequence[Observation], position: int, level: str, against: str) -> Pairs:
    """Return the pairs of two levels of the factor at a position."""
    sides: dict[str, dict[tuple[tuple[str, ...], int], Mapping[str, float]]]
    sides = {level: {}, against: {}}
    for seen in observations:
        side = sides.get(seen.levels[position])
        if side is not None:
            condition = seen.levels[:position] + seen.levels[position + 1 :]
            side[condition, seen.block] = seen.values
    pairs: Pairs = {}
    for key, values in sides[level].items():
        other = sides[against].get(key)
        if other is not None:
            pairs.setdefault(key[0], []).append((values, other))
    return pairs


def effects_of(
    observations: Sequence[Observation], factors: Mapping[str, Sequence[str]]
) -> list[Effect]:
    """Return the effect of each level against each one that stands before it in its factor.

    Args:
        observations: The runs that count.
        factors: The levels of each factor, in the order of the observations' levels.
    """
    effects = []
    every = math.prod(len(levels) for levels in factors.values())
    for position, (factor, levels) in enumerate(factors.items()):
        for against, level in itertools.combinations(levels, 2):
            pairs = pairs_of(observations, position, level, against)
            if not pairs:
                continue
            effects.append(
                Effect(
                    factor=factor,
                    level=level,
                    against=against,
                    conditions=len(pairs),
                    of_conditions=every // len(levels),
                    pairs=sum(len(group) for group in pairs.values()),
                    ratios=ratios_of(pairs),
                    differences=_differences(pairs),
                )
            )
    return effects


def ratios_of(pairs: Pairs) -> dict[str, Ratio]:
    """Return the ratio of each figure that both sides of a pair have."""
    found = {}
    for name in RATIOS:
        logs = [[math.log(new / old) for new, old in group] for group in _known(pairs, name)]
        if logs:
            found[name] = mean_ratio(logs)
    return found


def _differences(pairs: Pairs) -> dict[str, Difference]:
    found = {}
    for name in DIFFERENCES:
        means = [statistics.fmean(new - old for new, old in group) for group in _known(pairs, name)]
        if means:
            found[name] = Difference(
                mean=statistics.fmean(means), smallest=min(means), largest=max(means)
            )
    return found


def _known(pairs: Pairs, name: str) -> list[list[tuple[float, float]]]:
    """Return one figure of the pairs, by condition, where both sides have it."""
    groups = [
        [(new[name], old[name]) for new, old in group if name in new and name in old]
        for group in pairs.values()
    ]
    return [group for group in groups if group]


def mean_ratio(logs: Sequence[Sequence[float]]) -> Ratio:
    """Return the ratio that the logarithms of pairs' ratios come to, grouped by condition."""
    means = [statistics.fmean(group) for group in logs]
    mean = statistics.fmean(means)
    half, basis = _half_and_basis(logs, means)
    estimate = Estimate.of_log(mean, half)
    return Ratio(
        value=estimate.value,
        low=estimate.low,
        high=estimate.high,
        smallest=math.exp(min(means)),
        largest=math.exp(max(means)),
        basis=basis,
    )


def half_width(variance: float, freedom: int) -> float:
    """Return half the width of the 95 % interval of a mean with this variance."""
    return float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(variance)


def _half_and_basis(
    logs: Sequence[Sequence[float]], means: Sequence[float]
) -> tuple[float | None, str]:
    """Return half the width of the mean's interval.

    From the repeats: pairs of one condition scatter alike, s^2 in all, so the mean of the
    conditions' means has the variance s^2 sum(1 / pairs) / conditions^2. With one repeat only the
    scatter of the conditions is left, which holds their real differences too.
    """
    n = len(logs)
    freedom = sum(len(group) - 1 for group in logs)
    if freedom:
        squares = sum(
            (value - mean) ** 2 for group, mean in zip(logs, means, strict=True) for value in group
        )
        variance = squares / freedom * sum(1 / len(group) for group in logs) / n**2
        basis = "repeats"
    elif n > 1:
        freedom, variance, basis = n - 1, statistics.variance(means) / n, "conditions"
    else:
        return None, "none"
    return half_width(variance, freedom), basis
