"""One planning run: what it knows, and how it runs a probe and learns from it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lora_advisor.advisor.arms import describe
from lora_advisor.advisor.predictor import Predictor
from lora_advisor.advisor.promise import Costs
from lora_advisor.advisor.space import Space
from lora_advisor.advisor.spill import without_spills
from lora_advisor.models.memory import graph_bytes
from lora_advisor.probes import nvml, unsloth
from lora_advisor.probes.architectures import Architecture, with_layers
from lora_advisor.probes.cards import Card
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import BusyError, StackError, UnavailableError
from lora_advisor.probes.forkserver import ForkServer
from lora_advisor.probes.machine import GIB, Machine, Stack
from lora_advisor.probes.prices import Price
from lora_advisor.probes.record import ProbeResult, difference, read_records, same_place
from lora_advisor.probes.runner import run_probe
from lora_advisor.probes.spec import Spec
from lora_advisor.probes.trail import Probed

#: Steps of a probe: the first makes the optimizer's states (and compiles), the second is like all
#: others; the median of three stands. A proof measures more.
WARMUP_STEPS, MEASURED_STEPS, PROOF_STEPS = 2, 3, 6
#: A probe whose steps are expected to take longer runs only part of the layers, at least so many.
_LONG_PROBE_S, _LEAST_LAYERS = 20.0, 4

#: Runs a configuration, `layers` of its decoder layers (None: all), and measures so many steps.
Probe = Callable[[RunConfig, int | None, int], ProbeResult]
Say = Callable[[str], None]


@dataclass
class Session:
    """One planning run."""

    spec: Spec
    architecture: Architecture
    machine: Machine
    stack: Stack
    card: Card | None
    space: Space
    predictor: Predictor
    probe: Probe | None
    say: Say
    cap_bytes: int | None
    started: float = field(default_factory=time.monotonic)
    costs: Costs = field(default_factory=Costs)
    probing_s: float = 0.0
    probes: int = 0
    reused: int = 0
    trials: int = 0
    trail: list[Probed] = field(default_factory=list)
    #: What cards cost to rent, where the user has brought that.
    prices: tuple[Price, ...] | None = None
    #: Runs of others that the models of a card that is not here have learnt from.
    imported: int = 0

    def cap_of(self, config: RunConfig) -> int | None:
        """Return what the allocator may take with a configuration; None for all there is."""
        return None if self.cap_bytes is None else self.cap_bytes - graph_bytes(config)


def prober(session: Session, record: Path, server: ForkServer | None) -> Probe:
    """Return what runs a configuration in a child process here."""

    def probe(config: RunConfig, layers: int | None, steps: int) -> ProbeResult:
        whole = session.architecture
        return run_probe(
            config,
            whole if layers is None else with_layers(whole, layers),
            session.machine,
            session.stack,
            cap_bytes=session.cap_of(config),
            record=record,
            device=session.spec.device,
            warmup_steps=WARMUP_STEPS,
            measured_steps=steps,
            max_seconds=15.0,
            timeout_s=600.0,
            server=server,
        )

    return probe


def reuse(session: Session, record: Path, *, strict: bool = False) -> None:
    """Take up what was measured before on this machine, stack and architecture.

    Raises:
        StackError: All of it is of another machine or stack, and `strict`.
    """
    useful: list[ProbeResult] = []
    results = read_records(record)
    if strict and results and not any(_is_from_here(session, r) for r in results):
        there = difference(results[-1], session.machine, session.stack)
        raise StackError(
            f"`{record}` holds probes of another machine or stack ({there}); name another record, "
            "or give --fresh to measure anew."
        )
    for result in results:
        if not _is_from_here(session, result) or result.doubts:
            continue
        if result.architecture != session.architecture.fingerprint:
            continue
        result = _as_fit(session, result)
        if result.outcome == "ok" or _still_too_large(result, session.cap_of(result.config)):
            useful.append(result)
    if useful:
        session.say(f"{len(useful)} earlier probes of this machine and stack taken up")
        session.reused = len(useful)
        session.trail += [Probed.of(result, "earlier") for result in useful]
        session.predictor = session.predictor.learn(useful)


def _is_from_here(session: Session, result: ProbeResult) -> bool:
    here = same_place(result, session.machine, session.stack)
    return here and result.engine in (None, unsloth.engine())


def _as_fit(session: Session, result: ProbeResult) -> ProbeResult:
    """Count a run that the driver let spill to the host as one that did not fit."""
    if result.machine.kind != "cuda" or result.outcome != "ok" or not result.config.is_buildable:
        return result
    return without_spills(result, session.predictor.predict(result.config).step_s)


def _still_too_large(result: ProbeResult, cap_bytes: int | None) -> bool:
    """Whether a run that failed for lack of memory would fail again under this cap."""
    if result.outcome != "out_of_memory" or result.cap_bytes is None or cap_bytes is None:
        return False
    return cap_bytes <= result.cap_bytes


def run(
    session: Session, config: RunConfig, why: str, *, steps: int = MEASURED_STEPS
) -> ProbeResult:
    """Probe a configuration unless it was, and learn from it.

    A time that is not to be trusted is measured once more.
    """
    known = session.predictor.result_of(config)
    if known is not None and (known.outcome != "ok" or len(known.step_times_s) >= steps):
        return known
    layers = None if why == "proof" else _layers(session, config)
    expected = session.predictor.predict(config)
    result = _once(session, config, layers, steps)
    if result.doubts and why != "baseline":
        session.trail.append(Probed.of(result, why, expected, layers))
        session.say(f"measured again: {', '.join(result.doubts)}")
        result = _once(session, config, layers, steps)
    session.trail.append(Probed.of(result, why, expected, layers))
    session.probes += 1
    session.predictor = session.predictor.learn([result])
    part = "" if layers is None else f", {layers} of {session.architecture.num_layers} layers"
    session.say(f"probe {session.probes} ({why}): {describe(config)}{part}: {_ending(result)}")
    return result


def _once(session: Session, config: RunConfig, layers: int | None, steps: int) -> ProbeResult:
    """Run a probe, and note what it took.

    Raises:
        BusyError: Another process took the GPU.
        UnavailableError: The GPU is gone.
    """
    assert session.probe is not None
    started = time.monotonic()
    try:
        result = session.probe(config, layers, steps)
    except BusyError as error:
        raise BusyError(f"{error} {_kept(session)}") from None
    finally:
        session.probing_s += time.monotonic() - started
    if session.spec.device == "cuda" and result.outcome == "failed" and nvml.device_count() == 0:
        raise UnavailableError(
            "The GPU must stay for the whole plan, but the driver shows none any more; "
            f"see that it works again. {_kept(session)}"
        )
    session.costs.note(result, time.monotonic() - started)
    return _as_fit(session, result) if layers is None else result


def _kept(session: Session) -> str:
    return f"The {session.probes} probes so far are kept; the same command goes on with them."


def _layers(session: Session, config: RunConfig) -> int | None:
    """Return how many layers to run where all of them would take long; None for all."""
    total = session.architecture.num_layers
    step = session.predictor.predict(config).step_s
    if total is None or step is None or session.architecture.trust_remote_code:
        return None
    if not config.is_buildable:  # what fewer of its layers would teach is not known
        return None
    share = _LONG_PROBE_S / (step.value * (WARMUP_STEPS + MEASURED_STEPS))
    layers = max(_LEAST_LAYERS, round(total * share))
    return layers if layers <= total / 2 else None


def _ending(result: ProbeResult) -> str:
    if result.outcome != "ok" or result.tokens_per_s is None:
        return result.outcome.replace("_", " ") + (f" ({result.detail})" if result.detail else "")
    memory = result.reserved_bytes or result.process_bytes or 0
    return f"{result.tokens_per_s:,.0f} tokens/s, {memory / GIB:.2f} GiB"
