"""Probe what promises most, learn from it, and prove the winner.

The loop ends when no configuration can be expected to beat the best one measured by more than 2 %,
or the budget is spent. Every result is on disk before the next probe begins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lora_advisor.advisor.arms import arm_of, code_of, short_form
from lora_advisor.advisor.promise import (
    AFTER_FAILURE,
    EXPLAINED,
    NEW_CODE,
    Promise,
    chance_of,
    most_promising,
)
from lora_advisor.advisor.search import score
from lora_advisor.advisor.session import (
    MEASURED_STEPS,
    PROOF_STEPS,
    WARMUP_STEPS,
    Session,
    run,
)
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import UNRECORDABLE, UsageError
from lora_advisor.probes.plan import Candidate
from lora_advisor.probes.record import ProbeResult

#: The winner is measured anew, at length; should it turn out slower than thought, the next one is.
_PROOFS = 3


def check_budget(session: Session, config: RunConfig) -> None:
    """Refuse a budget that is too short for a single probe.

    Raises:
        UsageError: With what it would need.
    """
    needed = _expected_s(session, short_form(config))
    if session.spec.probe_budget_s < needed and not session.reused:
        raise UsageError(
            f"`--budget` must allow at least one probe, which is expected to take {needed:.0f} s "
            f"here, but got {session.spec.probe_budget_s:g} s; give --budget {3 * needed:.0f}s or "
            "more, or --device none to predict."
        )


def no_time_for_engine(session: Session) -> str | None:
    """Return why the budget cannot pay for another engine's probe and its proof; None where it can.

    What is known of it from earlier probes has only to be proved.
    """
    budget_s = session.spec.probe_budget_s
    needed = session.costs.engine_start_s * (1 if session.predictor.engine.probes else 2)
    if needed <= budget_s:
        return None
    return f"a probe of it and its proof take {needed:.0f} s, and --budget is {budget_s:g} s"


def _expected_s(session: Session, config: RunConfig, steps: int = MEASURED_STEPS) -> float:
    step = session.predictor.predict(config).step_s
    seconds = None if step is None else step.value
    return session.costs.expected_s(config, seconds, WARMUP_STEPS + steps)


def probe_loop(session: Session, configs: list[RunConfig]) -> None:
    """Probe the most promising configuration until none promises more, or time is up.

    A smaller micro-batch of what ran out of memory joins `configs`: the search left it out, because
    the larger one was expected to fit.
    """
    while True:
        best = _best_measured(session, configs)
        left = session.spec.probe_budget_s - session.probing_s
        promises = [
            (config, _promise(session, config), _expected_s(session, short_form(config)))
            for config in _open(session, configs)
        ]
        # What is best in the end is still to be proved.
        affordable = [
            (config, promise, cost)
            for config, promise, cost in promises
            if cost + _expected_s(session, config, PROOF_STEPS) <= left
        ]
        chosen = _next(session, affordable, best)
        if chosen is None:
            more = _next(session, promises, best) is not None
            session.say(
                f"what may gain more takes longer than is left of {session.spec.probe_budget_s:g} s"
                if more
                else "no configuration left can be expected to gain 2 %"
            )
            return
        result = run(session, short_form(chosen), "most promising")
        if result.outcome == "out_of_memory":
            for config in [chosen, *configs]:
                configs += _smaller(session, config, configs)
        if is_unrecordable(result) and "cuda_graph" not in session.spec.fixed:
            plain = [config.replace(cuda_graph="off") for config in configs]
            configs += [config for config in plain if config not in configs]


def _next(
    session: Session, promises: Sequence[tuple[RunConfig, Promise, float]], best: float | None
) -> RunConfig | None:
    if not promises:
        return None
    if best is None:
        return max(promises, key=lambda p: p[1].tokens_per_s * p[1].chance)[0]
    return most_promising(promises, best)


def _smaller(session: Session, config: RunConfig, configs: Sequence[RunConfig]) -> list[RunConfig]:
    """Return the next smaller micro-batch that no failure rules out; none where this one stands."""
    if not _is_ruled_out(session, config):
        return []
    for size in sorted(session.space.axes["micro_batch"], reverse=True):
        if size < config.micro_batch:
            accumulation = session.space.effective_batch // size
            smaller = config.replace(micro_batch=size, accumulation=accumulation)
            if not _is_ruled_out(session, smaller):
                return [] if smaller in configs else [smaller]
    return []


def _is_ruled_out(session: Session, config: RunConfig) -> bool:
    """Whether a run that failed says that this one would."""
    failed = [r for r in session.predictor.results if r.outcome != "ok"]
    return any(_as_large(config, result) for result in failed)


def expected_speed(session: Session, config: RunConfig) -> float | None:
    """Return the tokens/s of a configuration, by its probe where there is one.

    A probe of fewer micro-batches a step says by how much the models are off, and from one of fewer
    layers they have learnt; None where it did not run.
    """
    short, predict = short_form(config), session.predictor.predict
    result = session.predictor.result_of(config) or session.predictor.result_of(short)
    if result is None and _ran(session, config):
        told = predict(config).tokens_per_s
        return None if told is None else told.value
    if result is None or result.outcome != "ok" or result.tokens_per_s is None:
        return None
    whole, part = predict(config).tokens_per_s, predict(result.config).tokens_per_s
    if whole is None or part is None:
        return result.tokens_per_s
    return result.tokens_per_s * whole.value / part.value


def _ran(session: Session, config: RunConfig) -> bool:
    """Whether a configuration ran well, be it with fewer micro-batches or layers."""
    ran = [r.config for r in session.predictor.results if r.outcome == "ok"]
    return config in ran or short_form(config) in ran


def _best_measured(session: Session, configs: Sequence[RunConfig]) -> float | None:
    speeds = [expected_speed(session, config) for config in configs]
    return max((speed for speed in speeds if speed is not None), default=None)


def _open(session: Session, configs: Sequence[RunConfig]) -> list[RunConfig]:
    """Return what has not run and may."""
    tried = {r.config for r in session.predictor.results}
    return [
        config
        for config in configs
        if short_form(config) not in tried
        and not _is_ruled_out(session, config)
        and session.predictor.predict(config).verdict != "does not fit"
    ]


def is_unrecordable(result: ProbeResult) -> bool:
    """Whether a run failed because its micro-batches cannot be recorded as CUDA graphs."""
    return result.outcome == "failed" and (result.detail or "").startswith(UNRECORDABLE)


def _as_large(config: RunConfig, result: ProbeResult) -> bool:
    """Whether a configuration needs at least what one that did not run needed.

    Optimizer and allocator are not worth a second try: with an adapter they move little.
    """
    if result.outcome == "failed" and not result.config.is_buildable:
        return config.trainer == result.config.trainer  # an installation that does not work
    if is_unrecordable(result):
        alike = ("cuda_graph", "compile", "kernels")
        return all(getattr(config, knob) == getattr(result.config, knob) for knob in alike)
    if arm_of(config) != arm_of(result.config) or config.trainer != result.config.trainer:
        return False
    if result.outcome == "out_of_memory":
        return config.tokens >= result.config.tokens
    # What failed for another reason fails at every size.
    return result.outcome in ("failed", "timed_out")


def _needs_as_much(session: Session, config: RunConfig, result: ProbeResult) -> bool:
    """Whether the models give a configuration as much memory as one that ran out of it.

    Configurations err together where the same code runs: compiled or not, 4-bit weights or not.
    Where a failure was far from what the models expect, they say nothing of others either.
    """
    other = result.config
    if result.outcome != "out_of_memory" or not session.predictor.is_whole(result):
        return False
    alike = ("method", "compile", "allocator", "is_buildable")
    if any(getattr(config, knob) != getattr(other, knob) for knob in alike):
        return False
    predict = session.predictor.predict
    failed_bytes = predict(other).memory.needed_bytes
    explained = failed_bytes >= EXPLAINED * session.predictor.cap_bytes
    return explained and predict(config).memory.needed_bytes >= 0.998 * failed_bytes


def _promise(session: Session, config: RunConfig) -> Promise:
    """Return what a configuration may reach."""
    prediction, time_ = session.predictor.predict(config), session.predictor.time(config)
    chance = chance_of(config, prediction, session.predictor.cap_bytes)
    if any(_needs_as_much(session, config, result) for result in session.predictor.results):
        chance *= AFTER_FAILURE
    if time_ is None or prediction.tokens_per_s is None:
        return Promise(tokens_per_s=float(config.tokens), deviation=math.log(2), chance=chance)
    deviation = time_.deviation
    if code_of(config) not in {code_of(r.config) for r in session.predictor.results}:
        deviation = max(deviation, NEW_CODE)
    return Promise(tokens_per_s=prediction.tokens_per_s.value, deviation=deviation, chance=chance)


def prove(session: Session, configs: Sequence[RunConfig]) -> Candidate | None:
    """Run the best configuration exactly as planned; return the best one that ran so.

    Once something has run well, only what was measured is proved: the loop before ended because
    nothing else promised enough, or because there was no time to find out. What turns out slower
    than the next is followed by the next while the budget lasts, what does not run in any case.
    """
    proved: list[RunConfig] = []
    while True:
        ranked = [candidate.config for candidate in _ranked(session, configs)]
        if not ranked:
            return None
        best = ranked[0]
        done = [config for config in ranked if config in proved]
        left = session.spec.probe_budget_s - session.probing_s
        enough = len(done) >= _PROOFS or _expected_s(session, best, PROOF_STEPS) > left
        if done and enough:
            best = done[0]
        if best in done:
            return session.predictor.candidate(best)
        run(session, best, "proof", steps=PROOF_STEPS)
        proved.append(best)


def _ranked(session: Session, configs: Sequence[RunConfig]) -> list[Candidate]:
    """Return what may be proved, best first."""
    candidates = with_results(session, [session.predictor.candidate(c) for c in configs])
    candidates = [c for c in candidates if c.measured is None or c.measured.outcome == "ok"]
    ran = [c for c in candidates if _ran(session, c.config)]
    open_ = [c for c in candidates if not _is_ruled_out(session, c.config)]
    return sorted(ran or open_, key=lambda c: _worth(session, c), reverse=True)


def _worth(session: Session, candidate: Candidate) -> float:
    if session.spec.objective == "tokens_per_s":
        speed = expected_speed(session, candidate.config)
        if speed is not None:
            return speed
    return score(candidate, session.spec.objective)


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
