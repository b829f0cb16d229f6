"""Effects that another factor changes: the same pairs, told apart by that factor's levels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_advisor.advisor.effects import Observation, Ratio, pairs_of, ratios_of


@dataclass(frozen=True, kw_only=True)
class Dependence:
    """An effect on tokens/s at one level of another factor, which changes it.

    Attributes:
        factor: Its name.
        level: The one level.
        against: The other.
        given_factor: The factor it depends on.
        given: That one's level.
        ratio: How many times as many tokens/s.
    """

    factor: str
    level: str
    against: str
    given_factor: str
    given: str
    ratio: Ratio


def dependences(
    observations: Sequence[Observation], factors: Mapping[str, Sequence[str]], *, least: float
) -> list[Dependence]:
    """Return the effects against a factor's first level that a later factor changes.

    Args:
        observations: The runs that count.
        factors: The levels of each factor, in the order of the observations' levels.
        least: How far, in log tokens/s, an effect must move to be worth telling.
    """
    found = []
    for position, (factor, levels) in enumerate(factors.items()):
        others = [name for name in factors if name != factor]
        for level in levels[1:]:
            pairs = pairs_of(observations, position, level, levels[0])
            for index, other in enumerate(others[position:], start=position):
                here = [
                    Dependence(
                        factor=factor,
                        level=level,
                        against=levels[0],
                        given_factor=other,
                        given=given,
                        ratio=ratios["tokens_per_s"],
                    )
                    for given in factors[other]
                    if (ratios := ratios_of({c: g for c, g in pairs.items() if c[index] == given}))
                ]
                if _differ([item.ratio for item in here], least):
                    found += here
    return found


def _differ(ratios: Sequence[Ratio], least: float) -> bool:
    """Whether the extremes lie apart by what is worth telling, and their intervals do not meet."""
    if not ratios:
        return False
    slow = min(ratios, key=lambda ratio: ratio.value)
    fast = max(ratios, key=lambda ratio: ratio.value)
    if slow.high is None or fast.low is None:
        return False
    return fast.low > slow.high and math.log(fast.value / slow.value) >= least
