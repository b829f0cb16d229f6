"""Settle on the card what a trace cannot: an uncertain answer, or a step that cannot be traced."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lora_advisor.probes.architectures import Architecture
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import BusyError, UntraceableError
from lora_advisor.probes.machine import Machine
from lora_advisor.probes.prediction import Interval, MemoryPrediction, Prediction
from lora_advisor.probes.record import ProbeResult

#: Runs a configuration on the card under the limit.
Probe = Callable[[RunConfig], ProbeResult]

#: What an ending says of the memory; other endings say nothing.
_VERDICTS = {"ok": "fits", "out_of_memory": "does not fit"}


@dataclass(frozen=True)
class Proof:
    """A prediction, and the run that settled it; the fields are those of FitAnswer."""

    prediction: Prediction
    measured: ProbeResult | None = None
    note: str | None = None


def card_probe(
    architecture: Architecture,
    machine: Machine,
    *,
    vram_bytes: int,
    reserve_bytes: int,
    record: Path,
) -> Probe:
    """Return what runs a configuration in a child process on the card that is here.

    Args:
        architecture: The model's figures.
        machine: The card.
        vram_bytes: What the process may hold, with the reserve.
        reserve_bytes: What to leave free of it.
        record: File the results are appended to.
    """

    def probe(config: RunConfig) -> ProbeResult:
        from lora_advisor.models.memory import graph_bytes
        from lora_advisor.probes.machine import detect_stack
        from lora_advisor.probes.record import check_writable
        from lora_advisor.probes.runner import capped_bytes, context_bytes_of, run_probe

        check_writable(record)
        return run_probe(
            config,
            architecture,
            machine,
            detect_stack(),
            cap_bytes=capped_bytes(
                vram_bytes, (context_bytes_of(machine) or 0) + graph_bytes(config), reserve_bytes
            ),
            record=record,
            device="cuda",
            max_seconds=15.0,
        )

    return probe


def prove(config: RunConfig, prediction: Prediction, probe: Probe) -> Proof:
    """Run exactly this configuration; where that says nothing, the prediction stays."""
    try:
        result = probe(config)
    except BusyError as error:
        return Proof(prediction, note=f"not settled by a run: {error}")
    verdict = _VERDICTS.get(result.outcome)
    if verdict is None:
        return Proof(prediction, result, f"the run that was to settle it {_ending(result)}")
    settled = dataclasses.replace(prediction, verdict=verdict, evidence="proved")
    return Proof(settled, result)


def run_instead(config: RunConfig, probe: Probe, error: UntraceableError) -> Proof:
    """Answer from a run of a step that cannot be traced.

    Two micro-batches a step stand for any larger number: what is alive beside a micro-batch are the
    gradients, from the second on.

    Raises:
        UntraceableError: The run ended in a way that says nothing of the memory.
    """
    short = config.replace(accumulation=min(2, config.accumulation))
    result = probe(short)
    verdict = _VERDICTS.get(result.outcome)
    if verdict is None:
        raise UntraceableError(f"{error} A run on the card {_ending(result)}.")
    speed = _speed(result)
    prediction = Prediction(
        memory=_measured_memory(result),
        verdict=verdict,
        step_s=None,
        tokens_per_s=speed,
        evidence="proved" if short == config else "probed",
    )
    return Proof(prediction, result, f"run on the card, because it cannot be traced: {error}")


def _ending(result: ProbeResult) -> str:
    ending = {"timed_out": "did not end in time"}.get(result.outcome, result.outcome)
    return ending + (f" ({result.detail.rstrip('.')})" if result.detail else "")


def _speed(result: ProbeResult) -> Interval | None:
    speed = result.tokens_per_s
    return None if speed is None else Interval(value=speed, low=speed, high=speed)


def _measured_memory(result: ProbeResult) -> MemoryPrediction:
    """Return what was measured; of a run that ended for lack of memory these are lower bounds."""
    cap, context = result.cap_bytes or 0, result.context_bytes or 0
    reserved = result.reserved_bytes if result.reserved_bytes is not None else cap
    allocated = result.allocated_bytes if result.allocated_bytes is not None else reserved
    if result.outcome != "ok":
        reserved = max(reserved, cap)
    process = reserved + context
    return MemoryPrediction(
        allocated_bytes=allocated,
        reserved_bytes=reserved,
        process_bytes=process,
        process_upper_bytes=process,
        needed_bytes=reserved,
        instant="unknown",
        components={},
        phases={},
        evidence="proved",
    )
