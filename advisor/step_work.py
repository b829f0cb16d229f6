"""The work of an optimizer step, by how often each part of it runs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from lora_advisor.probes.events import Trace, Work


@dataclass(frozen=True)
class StepWork:
    """Work of an optimizer step in parts.

    Attributes:
        once: That of its end: the gradients' norm, the optimizer.
        layers: That of the decoder layers in one micro-batch.
        outside: All other of one micro-batch.
    """

    once: Work
    layers: Work
    outside: Work

    @classmethod
    def of(cls, trace: Trace) -> StepWork:
        """Sum up a trace."""
        parts = [Work(), Work(), Work()]
        for (phase, layer), work in trace.work.items():
            part = 0 if phase == "optimizer" else 1 if layer >= 0 else 2
            parts[part] += work
        return cls(*parts)

    def step(self, accumulation: int, layers: float = 1.0) -> Work:
        """Return the work of a step of some micro-batches.

        Args:
            accumulation: Micro-batches.
            layers: Share of the decoder layers that run; the optimizer's work goes with it, for
                what it trains is in them.
        """
        each = self.layers.times(layers) + self.outside
        return self.once.times(layers) + each.times(accumulation)

    def amounts(self) -> list[dict[str, float]]:
        """Return the JSON form."""
        return [dataclasses.asdict(part) for part in (self.once, self.layers, self.outside)]
