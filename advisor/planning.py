"""From what the user wants to what to run: probe, fit, search, prove.

On a device that is here the loop probes the configuration that the models hold most for, learns
from it, and goes on until none left is expected to beat the best one measured, or the budget is
spent. Its winner has run: it is proved. For a card that is not here the search's winner is traced,
and said to be.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_advisor.advisor.predictor import Predictor
from lora_advisor.advisor.search import rank, search
from lora_advisor.advisor.space import Space, baseline_config, build_space
from lora_advisor.probes.architectures import Architecture, resolve_architecture
from lora_advisor.probes.cards import Card, card_of, find_card
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import AdvisorError
from lora_advisor.probes.machine import GIB, Machine, Stack, detect_machine, detect_stack
from lora_advisor.probes.plan import Candidate, DataSummary, Plan
from lora_advisor.probes.record import ProbeResult, check_writable, read_records, same_place
from lora_advisor.probes.runner import capped_bytes, context_bytes_of, run_probe
from lora_advisor.probes.spec import Spec

#: A candidate must promise this much more than the best measured one to be worth a probe.
WORTH = 1.02
#: How far, in log time, a candidate may be better than predicted: of an arm that was probed, and of
#: one that was not (then the model's own spread counts, at most this).
_KNOWN_ARM = 0.03
_NEW_ARM = 0.35
_RUNNERS_UP = 5

Probe = Callable[[RunConfig], ProbeResult]
Say = Callable[[str], None]


class NothingFitsError(AdvisorError):
    """No configuration of the space fits the memory: an answer, with exit code 1."""

    exit_code = 1


@dataclass
class _Session:
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


def make_plan(
    spec: Spec,
    *,
    record: Path,
    data: DataSummary | None = None,
    say: Say = lambda line: None,
    fresh: bool = False,
    probe: Probe | None = None,
) -> Plan:
    """Return the plan for a spec.

    Args:
        spec: What the user wants.
        record: File of probe results: read first, appended to.
        data: What the user's data asks for.
        say: Called with a line of progress.
        fresh: Do not use earlier results.
        probe: Runs a probe; by default a child process on the spec's device.

    Raises:
        NothingFitsError: No configuration fits.
        AdvisorError: As the parts raise it.
    """
    session = _open(spec, say)
    if spec.device != "none":
        check_writable(record)
        session.probe = probe or _prober(session, record)
        if not fresh:
            _reuse(session, record)
    return _plan(session, data)


def _open(spec: Spec, say: Say) -> _Session:
    architecture = resolve_architecture(spec.model, trust_remote_code=spec.trust_remote_code)
    stack = detect_stack()
    card: Card | None
    if spec.device == "none":
        card = find_card(spec.gpu or "rtx-4060")
        machine = card.machine()
    else:
        machine = detect_machine(spec.device)
        card = card_of(machine) if spec.device == "cuda" else None
    space = build_space(spec, machine, stack, card)
    context = None
    cap = None
    if spec.device == "cuda":
        context = context_bytes_of(machine)
        cap = capped_bytes(spec.vram_bytes, context or 0, spec.reserve_bytes)
    elif spec.device == "cpu":
        cap = spec.vram_bytes - spec.reserve_bytes
    predictor = Predictor.start(
        architecture,
        machine,
        card,
        limit_bytes=spec.vram_bytes - spec.reserve_bytes,
        precision=space.axes["precision"][0],
        context_bytes=context,
    )
    return _Session(spec, architecture, machine, stack, card, space, predictor, None, say, cap)


def _prober(session: _Session, record: Path) -> Probe:
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


def _reuse(session: _Session, record: Path) -> None:
    """Take up what was measured before on this machine, stack and architecture."""
    useful: list[ProbeResult] = []
    for result in read_records(record):
        if not same_place(result, session.machine, session.stack):
            continue
        if result.architecture != session.architecture.fingerprint:
            continue
        if result.outcome == "ok" or _still_too_large(result, session.cap_bytes):
            useful.append(result)
    if useful:
        session.say(f"{len(useful)} earlier probes of this machine and stack taken up")
        session.reused = len(useful)
        session.predictor = session.predictor.learn(useful)


def _still_too_large(result: ProbeResult, cap_bytes: int | None) -> bool:
    """Whether a run that failed for lack of memory would fail again under this cap."""
    if result.outcome != "out_of_memory" or result.cap_bytes is None or cap_bytes is None:
        return False
    return cap_bytes <= result.cap_bytes


def _plan(session: _Session, data: DataSummary | None) -> Plan:
    baseline = _baseline(session)
    session.say("searching the space over the models")
    found = search(
        session.space,
        session.predictor,
        objective=session.spec.objective,
        seed=session.spec.seed,
    )
    session.trials = found.trials
    configs = [candidate.config for candidate in found.feasible]
    if session.probe is not None:
        _probe_loop(session, configs)
        chosen = _prove(session, configs)
    else:
        safe = [c for c in found.feasible if c.prediction.verdict == "fits"]
        chosen = safe[0] if safe else None
    if chosen is None:
        raise NothingFitsError(_nothing_fits(session, found.infeasible, configs))
    return _finish(session, chosen, baseline, configs, found.infeasible, data)


def _baseline(session: _Session) -> Candidate | None:
    """Return what the user would run otherwise, probed if there is a device."""
    precision = session.space.axes["precision"][0]
    config = baseline_config(session.spec, precision)
    if session.probe is not None:
        _run(session, _short(config), "baseline")
        config = _short(config)
    return session.predictor.candidate(config)


def _short(config: RunConfig) -> RunConfig:
    """Return the configuration with at most two micro-batches a step.

    Its memory is that of any larger number: what is alive beside a micro-batch are the gradients,
    from the second on.
    """
    return config.replace(accumulation=min(2, config.accumulation))


def _arm(config: RunConfig) -> tuple[Any, ...]:
    """Return what decides how fast a configuration is beside its size."""
    return (config.method, config.kernels, config.compile, config.checkpointing, config.precision)


def _run(session: _Session, config: RunConfig, why: str) -> ProbeResult:
    """Probe a configuration unless it was, and learn from it."""
    known = session.predictor.result_of(config)
    if known is not None:
        return known
    assert session.probe is not None
    started = time.monotonic()
    result = session.probe(config)
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


def _probe_loop(session: _Session, configs: list[RunConfig]) -> None:
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
        result = _run(session, _short(config), "most promising")
        if result.outcome == "out_of_memory":
            configs += _next_smaller(session, config, configs)
    session.say(f"the probe budget of {session.spec.probe_budget_s:g} s is spent")


def _next_smaller(
    session: _Session, config: RunConfig, configs: Sequence[RunConfig]
) -> list[RunConfig]:
    sizes = [n for n in session.space.axes["micro_batch"] if n < config.micro_batch]
    if not sizes:
        return []
    size = max(sizes)
    smaller = config.replace(micro_batch=size, accumulation=session.space.effective_batch // size)
    return [] if smaller in configs else [smaller]


def _best_measured(session: _Session, configs: Sequence[RunConfig]) -> float | None:
    speeds = [
        result.tokens_per_s
        for config in configs
        if (result := session.predictor.result_of(_short(config))) is not None
        and result.outcome == "ok"
        and result.tokens_per_s is not None
    ]
    return max(speeds, default=None)


def _most_promising(session: _Session, configs: Sequence[RunConfig]) -> RunConfig | None:
    failed = [r for r in session.predictor.results if r.outcome != "ok"]
    open_ = [
        config
        for config in configs
        if session.predictor.result_of(_short(config)) is None
        and not any(_as_large(config, result) for result in failed)
        and session.predictor.predict(config).verdict != "does not fit"
    ]
    return max(open_, key=lambda config: _promise(session, config), default=None)


def _as_large(config: RunConfig, result: ProbeResult) -> bool:
    """Whether a configuration needs at least what one that did not run needed.

    Optimizer and allocator are not worth a second try: with an adapter they move little.
    """
    if _arm(config) != _arm(result.config) or config.trainer != result.config.trainer:
        return False
    if result.outcome == "out_of_memory":
        return config.tokens >= result.config.tokens
    # What failed for another reason fails at every size.
    return result.outcome in ("failed", "timed_out")


def _promise(session: _Session, config: RunConfig) -> float:
    """Return the tokens/s that a configuration may reach if things go well for it."""
    prediction = session.predictor.predict(config)
    if prediction.tokens_per_s is None:
        return float(config.tokens)
    probed = {_arm(r.config) for r in session.predictor.results if r.outcome == "ok"}
    room = _KNOWN_ARM if _arm(config) in probed else _NEW_ARM
    # A bound that straddles the limit may cost a probe for nothing.
    risk = 0.9 if prediction.verdict == "uncertain" else 1.0
    return prediction.tokens_per_s.value * math.exp(room) * risk


def _prove(session: _Session, configs: Sequence[RunConfig]) -> Candidate | None:
    """Run the best configurations, best first, exactly as planned, until one ends well.

    Once something has run well, only what was measured is proved: the loop before ended because
    nothing else promised enough, or because there was no time to find out.
    """
    measured = _best_measured(session, configs) is not None
    candidates = [session.predictor.candidate(config) for config in configs]
    for candidate in rank(_with_short_results(session, candidates), session.spec.objective):
        if candidate.measured is None and measured:
            continue
        if candidate.measured is not None and candidate.measured.outcome != "ok":
            continue
        if _run(session, candidate.config, "proof").outcome == "ok":
            return session.predictor.candidate(candidate.config)
    return None


def _nothing_fits(
    session: _Session, infeasible: Sequence[Candidate], configs: Sequence[RunConfig]
) -> str:
    limit = session.spec.vram_bytes / GIB
    everything = list(infeasible) + [session.predictor.candidate(c) for c in configs]
    everything.sort(key=lambda c: c.prediction.memory.process_upper_bytes)
    least = everything[0]
    memory = least.prediction.memory
    return (
        f"nothing fits {limit:g} GiB: the smallest configuration ({describe(least.config)}) needs "
        f"{memory.process_bytes / GIB:.2f} GiB, at most {memory.process_upper_bytes / GIB:.2f}; "
        "take a smaller model, a shorter --seq, or more --vram."
    )


def _finish(
    session: _Session,
    chosen: Candidate,
    baseline: Candidate | None,
    configs: Sequence[RunConfig],
    infeasible: Sequence[Candidate],
    data: DataSummary | None,
) -> Plan:
    others = [session.predictor.candidate(c) for c in configs if c != chosen.config]
    runners: list[Candidate] = []
    lost: list[Candidate] = []
    for candidate in rank(_with_short_results(session, others), session.spec.objective):
        reason = _reason(session, candidate, chosen)
        group = lost if _cannot_run(session, candidate) else runners
        group.append(_because(candidate, reason))
    near = sorted(
        (_because(c, _reason(session, c, chosen)) for c in infeasible),
        key=lambda c: c.tokens_per_s or 0.0,
        reverse=True,
    )
    return Plan(
        spec=session.spec,
        machine=session.machine,
        stack=session.stack,
        architecture=session.architecture,
        chosen=chosen,
        baseline=baseline,
        runners_up=tuple(_one_each(runners)[:_RUNNERS_UP]),
        rejected=tuple((_one_each(lost) + _one_each(near))[:_RUNNERS_UP]),
        excluded=session.space.excluded,
        cap_bytes=session.cap_bytes,
        context_bytes=session.predictor.memory.context.value_bytes,
        probes=session.probes,
        reused=session.reused,
        probing_s=session.probing_s,
        wall_s=time.monotonic() - session.started,
        trials=session.trials,
        data=data,
    )


def _because(candidate: Candidate, reason: str) -> Candidate:
    return Candidate(
        config=candidate.config,
        prediction=candidate.prediction,
        measured=candidate.measured,
        reason=reason,
    )


def _with_short_results(session: _Session, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Give each candidate the probe that stands for it."""
    return [
        Candidate(
            config=c.config,
            prediction=c.prediction,
            measured=c.measured or session.predictor.result_of(_short(c.config)),
        )
        for c in candidates
    ]


def _one_each(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Keep the first candidate of each arm: a list of one arm's micro-batches tells little."""
    seen: set[tuple[Any, ...]] = set()
    kept = []
    for candidate in candidates:
        arm = _arm(candidate.config)
        if arm not in seen:
            seen.add(arm)
            kept.append(candidate)
    return kept


def _cannot_run(session: _Session, candidate: Candidate) -> bool:
    if candidate.measured is not None:
        return candidate.measured.outcome != "ok"
    if session.probe is None:
        return candidate.prediction.verdict != "fits"
    return candidate.prediction.verdict == "does not fit"


def _reason(session: _Session, candidate: Candidate, chosen: Candidate) -> str:
    """Say why a candidate lost."""
    memory = candidate.prediction.memory
    limit = session.predictor.limit_bytes / GIB
    if candidate.measured is not None and candidate.measured.outcome != "ok":
        return f"ran: {candidate.measured.outcome.replace('_', ' ')}"
    if candidate.prediction.verdict == "does not fit" and candidate.measured is None:
        least = (memory.needed_bytes + session.predictor.memory.context.value_bytes) / GIB
        return f"needs {least:.2f} GiB of {limit:.2f}"
    if session.probe is None and candidate.prediction.verdict == "uncertain":
        return f"may need up to {memory.process_upper_bytes / GIB:.2f} GiB of {limit:.2f}"
    mine, best = candidate.tokens_per_s, chosen.tokens_per_s
    if mine is None or best is None:
        return "fewer tokens in a micro-batch"
    kind = "measured" if candidate.evidence == "proved" else candidate.evidence
    return (
        f"{100 * (1 - mine / best):.0f} % slower ({kind})"
        if mine < best * 0.995
        else f"as fast ({kind})"
    )


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
