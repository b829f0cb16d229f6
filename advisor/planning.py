"""From what the user wants to what to run: probe, fit, search, prove.

On a device that is here the loop probes the configuration that the models hold most for, learns
from it, and goes on until none left is expected to beat the best one measured, or the budget is
spent. Its winner has run: it is proved. For a card that is not here the search's winner is traced,
and said to be.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_advisor.advisor.arms import arm_of, describe, short_form
from lora_advisor.advisor.predictor import Predictor
from lora_advisor.advisor.probing import check_budget, probe_loop, prove, with_results
from lora_advisor.advisor.search import rank, search
from lora_advisor.advisor.session import Probe, Say, Session, prober, reuse, run
from lora_advisor.advisor.space import baseline_config, build_space
from lora_advisor.advisor.study_file import write_study
from lora_advisor.probes.architectures import Architecture, resolve_architecture
from lora_advisor.probes.cards import Card, card_of, find_card
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import AdvisorError
from lora_advisor.probes.forkserver import ForkServer
from lora_advisor.probes.machine import GIB, detect_machine, detect_stack
from lora_advisor.probes.plan import Candidate, DataSummary, Plan
from lora_advisor.probes.record import check_writable
from lora_advisor.probes.runner import capped_bytes, context_bytes_of
from lora_advisor.probes.spec import Spec

if TYPE_CHECKING:
    import optuna

_RUNNERS_UP = 5


class NothingFitsError(AdvisorError):
    """No configuration of the space fits the memory: an answer, with exit code 1."""

    exit_code = 1


def make_plan(
    spec: Spec,
    *,
    record: Path,
    data: DataSummary | None = None,
    say: Say = lambda line: None,
    fresh: bool = False,
    probe: Probe | None = None,
    cache: Path | None = None,
    study_file: Path | None = None,
) -> Plan:
    """Return the plan for a spec.

    Args:
        spec: What the user wants.
        record: File of probe results: read first, appended to.
        data: What the user's data asks for.
        say: Called with a line of progress.
        fresh: Do not use earlier results.
        probe: Runs a probe; by default a child process on the spec's device.
        cache: File that keeps what traces came to; None to keep nothing.
        study_file: SQLite file that the search's study is added to; None to keep none.

    Raises:
        NothingFitsError: No configuration fits.
        AdvisorError: As the parts raise it.
    """
    architecture = resolve_architecture(spec.model, trust_remote_code=spec.trust_remote_code)
    server = None
    if spec.device == "cuda":
        # Its imports go on while the first questions are answered here.
        server = ForkServer(offline=architecture.weights is None)
    session = _open(spec, architecture, say, cache, server)
    session.predictor.store.server = server
    try:
        if spec.device != "none":
            check_writable(record)
            session.probe = probe or prober(session, record, server)
            if not fresh:
                reuse(session, record)
        plan, study = _plan(session, data)
    finally:
        session.predictor.store.close()
        if server is not None:
            server.close()
    if study_file is not None:
        write_study(study_file, study, plan)
    return plan


def _open(
    spec: Spec, architecture: Architecture, say: Say, cache: Path | None, server: ForkServer | None
) -> Session:
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
        context = context_bytes_of(machine, server)
        cap = capped_bytes(spec.vram_bytes, context or 0, spec.reserve_bytes)
    elif spec.device == "cpu":
        cap = spec.vram_bytes - spec.reserve_bytes
    predictor = Predictor.start(
        architecture,
        machine,
        card,
        limit_bytes=spec.vram_bytes - spec.reserve_bytes,
        context_bytes=context,
        cache=cache,
    )
    return Session(spec, architecture, machine, stack, card, space, predictor, None, say, cap)


def _plan(session: Session, data: DataSummary | None) -> tuple[Plan, optuna.Study]:
    session.say("searching the space over the models")
    found = search(
        session.space,
        session.predictor,
        objective=session.spec.objective,
        seed=session.spec.seed,
        free_trials=session.spec.free_trials,
    )
    session.trials = found.trials
    configs = [candidate.config for candidate in found.feasible]
    baseline = _baseline(session)
    if session.probe is not None:
        if baseline is not None and _is_as_fixed(session, baseline.config):
            configs.append(baseline.config)
        probe_loop(session, configs)
        chosen = prove(session, configs)
    else:
        safe = [c for c in found.feasible if c.prediction.verdict == "fits"]
        chosen = safe[0] if safe else None
    if chosen is None:
        raise NothingFitsError(_nothing_fits(session, found.infeasible, configs))
    return _finish(session, chosen, baseline, configs, found.infeasible, data), found.study


def _is_as_fixed(session: Session, config: RunConfig) -> bool:
    """Whether a configuration keeps what the user fixed, so that it may be the plan itself."""
    return all(getattr(config, knob) == value for knob, value in session.spec.fixed.items())


def _baseline(session: Session) -> Candidate | None:
    """Return what the user would run otherwise, probed if there is a device."""
    precision = session.space.axes["precision"][0]
    config = baseline_config(session.spec, precision)
    if session.probe is not None:
        check_budget(session, config)
        run(session, short_form(config), "baseline")
    return with_results(session, [session.predictor.candidate(config)])[0]


def _nothing_fits(
    session: Session, infeasible: Sequence[Candidate], configs: Sequence[RunConfig]
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
    session: Session,
    chosen: Candidate,
    baseline: Candidate | None,
    configs: Sequence[RunConfig],
    infeasible: Sequence[Candidate],
    data: DataSummary | None,
) -> Plan:
    others = [session.predictor.candidate(c) for c in configs if c != chosen.config]
    runners: list[Candidate] = []
    lost: list[Candidate] = []
    for candidate in rank(with_results(session, others), session.spec.objective):
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


def _one_each(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Keep the first candidate of each arm: a list of one arm's micro-batches tells little."""
    seen: set[tuple[Any, ...]] = set()
    kept = []
    for candidate in candidates:
        arm = arm_of(candidate.config)
        if arm not in seen:
            seen.add(arm)
            kept.append(candidate)
    return kept


def _cannot_run(session: Session, candidate: Candidate) -> bool:
    if candidate.measured is not None:
        return candidate.measured.outcome != "ok"
    if session.probe is None:
        return candidate.prediction.verdict != "fits"
    return candidate.prediction.verdict == "does not fit"


def _reason(session: Session, candidate: Candidate, chosen: Candidate) -> str:
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
