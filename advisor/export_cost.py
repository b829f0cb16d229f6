"""What it costs that a target cannot express something: GiB and tokens/s, where they are known.

The figures are the plan's own where it has measured both configurations, else the models' for the
plan's card. Neither is a measurement of the target's stack, and the text never says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import AdvisorError
from lora_advisor.probes.machine import GIB

if TYPE_CHECKING:
    from lora_advisor.advisor.predictor import Predictor
    from lora_advisor.probes.plan import Plan
    from lora_advisor.probes.prediction import Prediction

#: Differences below these shares are none.
_SAME_SPEED = 0.005
_SAME_BYTES = 0.005 * GIB


@dataclass(frozen=True)
class Prices:
    """Prices of changes, on one plan's card.

    Attributes:
        plan: Whose figures are taken first.
        predictor: Says the rest; None where there is no model of the device.
    """

    plan: Plan
    predictor: Predictor | None

    def between(self, before: RunConfig, after: RunConfig) -> str | None:
        """Return what going from one configuration to another costs; None where it is unknown."""
        measured = self._measured(before, after)
        if measured is not None:
            return measured
        if self.predictor is None:
            return None
        try:
            old, new = self.predictor.predict(before), self.predictor.predict(after)
        except AdvisorError:
            return None
        return self._traced(before, after, old, new)

    def _measured(self, before: RunConfig, after: RunConfig) -> str | None:
        found = [self._of_plan(config) for config in (before, after)]
        if found[0] is None or found[1] is None:
            return None
        (old_speed, old_bytes), (new_speed, new_bytes) = found[0], found[1]
        return _said(new_speed / old_speed, new_bytes - old_bytes, "measured for the plan")

    def _of_plan(self, config: RunConfig) -> tuple[float, int] | None:
        plan = self.plan
        every = (plan.chosen, plan.baseline, *plan.runners_up, *plan.front)
        for candidate in every:
            if candidate is None or candidate.config != config or candidate.measured is None:
                continue
            ran = candidate.measured
            if ran.tokens_per_s is not None and ran.process_bytes is not None:
                return ran.tokens_per_s, ran.process_bytes
        return None

    def _traced(
        self, before: RunConfig, after: RunConfig, old: Prediction, new: Prediction
    ) -> str | None:
        more = new.memory.process_bytes - old.memory.process_bytes
        speed = None
        # What compiling gains can only be measured, and offloaded checkpoints have no price.
        if before.compile == after.compile and old.tokens_per_s and new.tokens_per_s:
            speed = new.tokens_per_s.value / old.tokens_per_s.value
        said = _said(speed, more, "traced")
        if before.compile != after.compile:
            said += " What compiling is worth in speed can only be measured."
        fits = {"fits": "fits", "does not fit": "does not fit"}.get(new.verdict, "may not fit")
        if new.verdict != old.verdict:
            said += f" The result {fits} the plan's memory."
        return said


def open_prices(plan: Plan, cache: Path | None) -> Prices:
    """Return the prices for a plan's card; what is traced for them is kept in a cache."""
    from lora_advisor.advisor.predictor import Predictor
    from lora_advisor.probes.cards import Card, card_of, find_card

    machine, spec = plan.machine, plan.spec
    card: Card | None
    if machine.kind == "card":
        card = find_card(spec.gpu or "rtx-4060")
    else:
        card = card_of(machine) if machine.kind == "cuda" else None
    predictor = Predictor.start(
        plan.architecture,
        machine,
        card,
        limit_bytes=spec.vram_bytes - spec.reserve_bytes,
        context_bytes=plan.context_bytes,
        cache=cache,
    )
    return Prices(plan, predictor)


def _said(speed: float | None, more_bytes: int, how: str) -> str:
    parts = []
    if abs(more_bytes) >= _SAME_BYTES:
        direction = "more" if more_bytes > 0 else "less"
        parts.append(f"{abs(more_bytes) / GIB:.2f} GiB {direction}")
    else:
        parts.append("as much memory")
    if speed is None:
        parts.append("speed unknown")
    elif abs(speed - 1) < _SAME_SPEED:
        parts.append("as fast")
    else:
        parts.append(f"{abs(speed - 1):.0%} {'faster' if speed > 1 else 'slower'}")
    return f"Effect: {', '.join(parts)} ({how})."
