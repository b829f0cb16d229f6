"""What a bench comes to: observations, effects, the model of all factors, the paper's ways."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from lora_advisor.advisor.bench import Bench, Run
from lora_advisor.advisor.cell_means import CellMeans
from lora_advisor.advisor.dependences import Dependence, dependences
from lora_advisor.advisor.effects import (
    DIFFERENCES,
    RATIOS,
    Effect,
    Observation,
    effects_of,
)
from lora_advisor.advisor.effects_model import Model, fit_model
from lora_advisor.advisor.paper import Way, ways

#: An effect that another factor moves by less than this is told as one effect.
_WORTH_TELLING = math.log(1.03)
#: A power limit times the time is the time under another name.
_NO_ENERGY = "board power"


@dataclass(frozen=True, kw_only=True)
class Study:
    """A bench and what follows from it.

    Attributes:
        bench: What ran.
        observations: Its runs that count.
        effects: What each level does against each before it, everything else equal.
        model: All factors at once; None where nothing varied.
        dependences: Effects that another factor changes.
        spread: Standard deviation of log tokens/s between runs of one configuration, without what
            a whole repeat had in common; None unknown.
        ways: The paper's table, walked here.
    """

    bench: Bench
    observations: tuple[Observation, ...]
    effects: tuple[Effect, ...]
    model: Model | None
    dependences: tuple[Dependence, ...]
    spread: float | None
    ways: tuple[Way, ...]


def study_of(bench: Bench) -> Study:
    """Return what follows from the runs there are."""
    factors = bench.design.factors
    observations = tuple(_observation(run) for run in bench.measured)
    means = CellMeans.of(observations) if observations else None
    model = fit_model(observations, factors)
    effects = effects_of(observations, factors)
    if model is not None:
        effects = [
            dataclasses.replace(e, modelled=model.effect(e.factor, e.level, e.against))
            for e in effects
        ]
    return Study(
        bench=bench,
        observations=observations,
        effects=tuple(effects),
        model=model,
        dependences=tuple(dependences(observations, factors, least=_WORTH_TELLING)),
        spread=None if means is None else means.residual,
        ways=() if means is None else tuple(ways(means, factors["method"])),
    )


def _observation(run: Run) -> Observation:
    known: dict[str, float | None] = {
        name: getattr(run.result, name) for name in (*RATIOS, *DIFFERENCES)
    }
    if run.result.energy_source == _NO_ENERGY:
        known["joules_per_token"] = None
    assert run.repeat is not None
    return Observation(
        levels=run.cell.levels,
        block=run.repeat,
        # An energy counter that did not move yet says nothing.
        values={name: float(value) for name, value in known.items() if value},
    )
