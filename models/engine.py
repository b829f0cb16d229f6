"""What is known of another engine's speed and memory beside the step of ours that stands for it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lora_advisor.models.throughput import StepTime
from lora_advisor.probes.prediction import MemoryPrediction

#: Live tensors of Unsloth's step, as a share of its stand-in's: 1.01 to 1.05 in 13 steps of three
#: architectures (benchmarks/results/unsloth_memory.json).
_LIVE = 1.03
#: How many times as fast it is as its stand-in, in log, before a probe tells; and how far the ratio
#: strays from one configuration to another. 1.26 where probes had taught the models (Qwen2.5-1.5B,
#: H100, tests/recordings/contenders/plan-qwen2.5-1.5b-1024-with-unsloth.json, which took 1.4);
#: 1.5 to 1.8 times what a card's figures give the stand-in, which itself runs faster than they say.
_FASTER, _FASTER_DEVIATION, _STRAYS = math.log(1.3), 0.2, 0.08


@dataclass(frozen=True)
class EngineSpeed:
    """How many times as fast an engine is as its stand-in.

    Attributes:
        mean: Most likely logarithm.
        deviation: Its standard deviation.
        probes: Runs of the engine behind it; 0 for an assumption.
    """

    mean: float = _FASTER
    deviation: float = _FASTER_DEVIATION
    probes: int = 0

    @classmethod
    def fit(cls, seen: Sequence[tuple[float, float]]) -> EngineSpeed:
        """Learn from steps: seconds that the stand-in is given, and seconds measured."""
        precision, weighed = _FASTER_DEVIATION**-2, _FASTER * _FASTER_DEVIATION**-2
        for expected_s, measured_s in seen:
            precision += _STRAYS**-2
            weighed += math.log(expected_s / measured_s) * _STRAYS**-2
        return cls(weighed / precision, precision**-0.5, len(seen))

    def of(self, stand_in: StepTime) -> StepTime:
        """Return the time of the engine's step from that of its stand-in."""
        own = stand_in.deviation if stand_in.total_deviation is None else stand_in.total_deviation
        return dataclasses.replace(
            stand_in,
            host=stand_in.host - self.mean,
            device=stand_in.device - self.mean,
            total_deviation=math.hypot(own, self.deviation, _STRAYS),
        )


def engine_memory(stand_in: MemoryPrediction) -> MemoryPrediction:
    """Return the memory of an engine's step from that of its stand-in.

    Its live tensors are a little more. It holds no more segments, often fewer; the bound stays.
    """
    more = round((_LIVE - 1) * stand_in.allocated_bytes)
    return dataclasses.replace(
        stand_in,
        allocated_bytes=stand_in.allocated_bytes + more,
        needed_bytes=stand_in.needed_bytes + more,
        reserved_bytes=max(stand_in.reserved_bytes, stand_in.allocated_bytes + more),
    )
