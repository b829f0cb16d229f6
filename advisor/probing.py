"""Probe what promises most, learn from it, and prove the winner.

The loop ends when no configuration is expected to beat the best one measured, or the budget is
spent. Every result is on disk before the next probe begins.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_advisor.advisor.predictor import Predictor
from lora_advisor.advisor.search import rank
from lora_advisor.advisor.space import Space
from lora_advisor.advisor.spill import without_spills
from lora_advisor.probes.architectures import Architecture
from lora_advisor.probes.cards import Card
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.machine import GIB, Machine, Stack
from lora_advisor.probes.plan import Candidate
from lora_advisor.probes.record import ProbeResult, read_records, same_place
from lora_advisor.probes.runner import run_probe
from lora_advisor.probes.spec import Spec

#: A candidate must promise this much more than the best measured one to be worth a probe.
WORTH = 1.02
#: How far, in log time, a candidate may be better than predicted: of an arm that was probed, and of
#: one that was not (then the model's own spread counts, at most this).
_KNOWN_ARM = 0.03
_NEW_ARM = 0.35

Probe = Callable[[RunConfig], ProbeResult]
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
    probing_s: float = 0.0
    probes: int = 0
    reused: int = 0
    trials: int = 0


def prober(session: Session, record: Path) -> Probe:
    """Return what runs a configuration in a child process here."""
    on_cpu = session.spec.device == "cpu"

    def probe(config: RunConfig) -> ProbeResult:
        return run_probe(
            config,
            session.architecture,
            session.machine,
            session.stack,
            cap_bytes=session.cap_bytes,
            record=record,
            device=session.spec.device,
            warmup_steps=2 if on_cpu else 3,
            measured_steps=3 if on_cpu else 6,
            max_seconds=15.0,
            timeout_s=600.0,
        )

    return probe


def reuse(session: Session, record: Path) -> None:
    """Take up what was measured before on this machine, stack and architecture."""
    useful: list[ProbeResult] = []
    for result in read_records(record):
        if not same_place(result, session.machine, session.stack):
            continue
        if result.architecture != session.architecture.fingerprint:
            continue
        result = _as_fit(session, result)
        if result.outcome == "ok" or _still_too_large(result, session.cap_bytes):
            useful.append(result)
    if useful:
        session.say(f"{len(useful)} earlier probes of this machine and stack taken up")
        session.reused = len(useful)
        session.predictor = session.predictor.learn(useful)


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


def short_form(config: RunConfig) -> RunConfig:
    """Return the configuration with at most two micro-batches a step.

    Its memory is that of any larger number: what is alive beside a micro-batch are the gradients,
    from the second on.
    """
    return config.replace(accumulation=min(2, config.accumulation))


def arm_of(config: RunConfig) -> tuple[Any, ...]:
    """Return what decides how fast a configuration is beside its size."""
    return (config.method, config.kernels, config.compile, config.checkpointing, config.precision)


def run(session: Session, config: RunConfig, why: str) -> ProbeResult:
    """Probe a configuration unless it was, and learn from it."""
    known = session.predictor.result_of(config)
    if known is not None:
        return known
    assert session.probe is not None
    started = time.monotonic()
    result = _as_fit(session, session.probe(config))
    session.probing_s += time.monotonic() - started
    session.probes += 1
    session.predictor = session.predictor.learn([result])
    session.say(f"probe {session.probes} ({why}): {describe(config)}: {_ending(result)}")
    return result


def _ending(result: ProbeResult) -> str:
    if result.outcome != "ok" or result.tokens_per_s is None:
        return result.outcome.replace("_", " ") + (f" ({result.detail})" if result.detail else "")
    memory = result.reserved_bytes or result.process_bytes or 0
    return f"{result.tokens_per_s:,.0f} tokens/s, {memory / GIB:.2f} GiB"


def probe_loop(session: Session, configs: list[RunConfig]) -> None:
    """Probe the most promising configuration until none promises more, or time is up.

    A smaller micro-batch of what ran out of memory joins `configs`: the search left it out, because
    the larger one was expected to fit.
    """
    while session.probing_s < session.spec.probe_budget_s:
        best = _best_measured(session, configs)
        config = _most_promising(session, configs)
        if config is None:
            return
        if best is not None and _promise(session, config) <= WORTH * best:
            session.say("no configuration left promises 2 % more")
            return
        result = run(session, short_form(config), "most promising")
        if result.outcome == "out_of_memory":
            configs += _next_smaller(session, config, configs)
    session.say(f"the probe budget of {session.spec.probe_budget_s:g} s is spent")


def _next_smaller(
    session: Session, config: RunConfig, configs: Sequence[RunConfig]
) -> list[RunConfig]:
    sizes = [n for n in session.space.axes["micro_batch"] if n < config.micro_batch]
    if not sizes:
        return []
    size = max(sizes)
    smaller = config.replace(micro_batch=size, accumulation=session.space.effective_batch // size)
    return [] if smaller in configs else [smaller]


def _best_measured(session: Session, configs: Sequence[RunConfig]) -> float | None:
    speeds = [
        result.tokens_per_s
        for config in configs
        if (result := session.predictor.result_of(short_form(config))) is not None
        and result.outcome == "ok"
        and result.tokens_per_s is not None
    ]
    return max(speeds, default=None)


def _most_promising(session: Session, configs: Sequence[RunConfig]) -> RunConfig | None:
    failed = [r for r in session.predictor.results if r.outcome != "ok"]
    open_ = [
        config
        for config in configs
        if session.predictor.result_of(short_form(config)) is None
        and not any(_as_large(config, result) for result in failed)
        and session.predictor.predict(config).verdict != "does not fit"
    ]
    return max(open_, key=lambda config: _promise(session, config), default=None)


def _as_large(config: RunConfig, result: ProbeResult) -> bool:
    """Whether a configuration needs at least what one that did not run needed.

    Optimizer and allocator are not worth a second try: with an adapter they move little.
    """
    if arm_of(config) != arm_of(result.config) or config.trainer != result.config.trainer:
        return False
    if result.outcome == "out_of_memory":
        return config.tokens >= result.config.tokens
    # What failed for another reason fails at every size.
    return result.outcome in ("failed", "timed_out")


def _promise(session: Session, config: RunConfig) -> float:
    """Return the tokens/s that a configuration may reach if things go well for it."""
    prediction = session.predictor.predict(config)
    if prediction.tokens_per_s is None:
        return float(config.tokens)
    probed = {arm_of(r.config) for r in session.predictor.results if r.outcome == "ok"}
    room = _KNOWN_ARM if arm_of(config) in probed else _NEW_ARM
    # A bound that straddles the limit may cost a probe for nothing.
    risk = 0.9 if prediction.verdict == "uncertain" else 1.0
    return prediction.tokens_per_s.value * math.exp(room) * risk


def prove(session: Session, configs: Sequence[RunConfig]) -> Candidate | None:
    """Run the best configurations, best first, exactly as planned, until one ends well.

    Once something has run well, only what was measured is proved: the loop before ended because
    nothing else promised enough, or because there was no time to find out.
    """
    measured = _best_measured(session, configs) is not None
    candidates = [session.predictor.candidate(config) for config in configs]
    for candidate in rank(with_results(session, candidates), session.spec.objective):
        if candidate.measured is None and measured:
            continue
        if candidate.measured is not None and candidate.measured.outcome != "ok":
            continue
        if run(session, candidate.config, "proof").outcome == "ok":
            return session.predictor.candidate(candidate.config)
    return None


def with_results(session: Session, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Give each candidate the probe that stands for it."""
    return [
        Candidate(
            config=c.config,
            prediction=c.prediction,
            measured=c.measured or session.predictor.result_of(short_form(c.config)),
        )
        for c in candidates
    ]


def describe(config: RunConfig) -> str:
    """Return a configuration in a few words."""
    parts = [
        config.method,
        config.precision,
        f"{config.micro_batch} x {config.seq_len} x {config.accumulation}",
        {"off": "no checkpointing", "full": "checkpointing"}.get(
            config.checkpointing, f"checkpointing {config.checkpointing}"
        ),
    ]
    if config.kernels != "none":
        parts.append(config.kernels)
    if config.compile != "off":
        parts.append(f"compiled {config.compile}")
    if config.optimizer != "adamw_torch_fused":
        parts.append(config.optimizer)
    if config.allocator != "default":
        parts.append("expandable segments")
    if config.trainer != "trl":
        parts.append(config.trainer)
    if config.fp32_upcast:
        parts.append("fp32 upcast")
    return ", ".join(parts)
