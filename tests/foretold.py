"""Predictions, candidates and results made up for tests of what is done with them."""

from __future__ import annotations

from typing import Any

from recorded import configure

from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.machine import GIB, cpu_machine, detect_stack
from lora_advisor.probes.plan import Candidate
from lora_advisor.probes.prediction import Interval, MemoryPrediction, Prediction
from lora_advisor.probes.record import ProbeResult


def prediction(
    *,
    verdict: str = "fits",
    needed_bytes: int = 6 * GIB,
    reserved_bytes: int = 7 * GIB,
    tokens_per_s: float | None = None,
    joules_per_token: float | None = None,
) -> Prediction:
    """Return what models may say of a configuration."""

    def certain(value: float | None) -> Interval | None:
        return None if value is None else Interval(value=value, low=value, high=value)

    return Prediction(
        memory=MemoryPrediction(
            allocated_bytes=5 * GIB,
            reserved_bytes=reserved_bytes,
            process_bytes=reserved_bytes + GIB // 2,
            process_upper_bytes=reserved_bytes + GIB,
            needed_bytes=needed_bytes,
            instant="loss",
            components={},
            phases={},
            evidence="traced",
        ),
        verdict=verdict,
        step_s=None,
        tokens_per_s=certain(tokens_per_s),
        evidence="traced",
        joules_per_token=certain(joules_per_token),
    )


def candidate(
    tokens_per_s: float | None, joules_per_token: float | None = None, **changes: Any
) -> Candidate:
    """Return a configuration with its speed and energy."""
    return Candidate(
        config=configure(**changes),
        prediction=prediction(tokens_per_s=tokens_per_s, joules_per_token=joules_per_token),
    )


def ended(config: RunConfig, outcome: str = "ok", **measured: Any) -> ProbeResult:
    """Return what came of a probe here."""
    return ProbeResult(
        config=config,
        architecture="tiny",
        hf_config={},
        machine=cpu_machine(),
        stack=detect_stack(),
        outcome=outcome,
        **measured,
    )
