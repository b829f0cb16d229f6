"""From a finished search and its probes to the `Plan`: the winner, and why the others lost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from lora_advisor.advisor.arms import arm_of, describe
from lora_advisor.advisor.attention import packed_attention
from lora_advisor.advisor.epochs import data_report
from lora_advisor.advisor.front import front
from lora_advisor.advisor.pricing import off_by, prices_of
from lora_advisor.advisor.probing import with_results
from lora_advisor.advisor.search import rank
from lora_advisor.advisor.session import Session
from lora_advisor.models.memory import graph_bytes
from lora_advisor.probes.batching import Batching
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.machine import GIB
from lora_advisor.probes.plan import Candidate, DataSummary, Plan
from lora_advisor.probes.trail import Considered

_RUNNERS_UP = 5
#: So many of what was looked at are kept in short.
_CONSIDERED = 300


def nothing_fits(
    session: Session, infeasible: Sequence[Candidate], configs: Sequence[RunConfig]
) -> str:
    """Say that nothing fits, and what came nearest."""
    limit = session.spec.vram_bytes / GIB
    everything = list(infeasible) + [session.predictor.candidate(c) for c in configs]
    everything.sort(key=lambda c: c.prediction.memory.process_upper_bytes)
    least = everything[0]
    memory = least.prediction.memory
    needs = (
        f"the smallest configuration ({describe(least.config)}) needs "
        f"{memory.process_bytes / GIB:.2f} GiB, at most {memory.process_upper_bytes / GIB:.2f}"
    )
    if session.probe is None and least.prediction.verdict == "uncertain":
        return (
            f"nothing is sure to fit {limit:g} GiB: {needs} as traced, and only a run on the card "
            "can tell; plan there, leave more knobs (--compile, --allocator) to the search, or "
            "take a smaller model, a shorter --seq, or more --vram."
        )
    return (
        f"nothing fits {limit:g} GiB: {needs}; "
        "take a smaller model, a shorter --seq, or more --vram."
    )


def conclude(
    session: Session,
    chosen: Candidate,
    baseline: Candidate | None,
    configs: Sequence[RunConfig],
    infeasible: Sequence[Candidate],
    data: DataSummary | None,
) -> Plan:
    """Return the plan with this winner.

    Args:
        session: The planning run.
        chosen: The winner.
        baseline: What the user would have run otherwise.
        configs: What fits or may fit.
        infeasible: What does not fit.
        data: What the user's data asks for.
    """
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
        cap_bytes=session.cap_of(chosen.config),
        context_bytes=session.predictor.memory.context.value_bytes,
        probes=session.probes,
        reused=session.reused,
        probing_s=session.probing_s,
        wall_s=time.monotonic() - session.started,
        trials=session.trials,
        data=data,
        front=front([chosen, *runners]),
        batchings=() if data is None else _batchings(session, chosen, data),
        trail=tuple(session.trail),
        considered=_considered([chosen, *runners, *lost, *infeasible]),
        imported=session.imported,
        imported_from=session.predictor.elsewhere,
    )


def _considered(candidates: Sequence[Candidate]) -> tuple[Considered, ...]:
    """Return in short what the search looked at, the fastest first."""
    ranked = sorted(candidates, key=lambda c: c.tokens_per_s or 0.0, reverse=True)
    return tuple(
        Considered(
            what=describe(c.config),
            tokens_per_s=c.tokens_per_s,
            process_bytes=c.prediction.memory.process_bytes,
            verdict=c.prediction.verdict,
        )
        for c in ranked[:_CONSIDERED]
    )


def _batchings(session: Session, chosen: Candidate, data: DataSummary) -> tuple[Batching, ...]:
    """Return what a pass over the data costs under each way to make micro-batches."""
    prices = prices_of(session.predictor, chosen.config, off_by(session, chosen.config))
    store = session.predictor.store
    packed = packed_attention(
        session.architecture, store.cache, session.machine, chosen.config.precision
    )
    return data_report(data, chosen.config, prices, seed=session.spec.seed, packed_attention=packed)


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
        beside = session.predictor.memory.context.value_bytes + graph_bytes(candidate.config)
        least = (memory.needed_bytes + beside) / GIB
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
