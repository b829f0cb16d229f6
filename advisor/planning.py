"""From what the user wants to what to run: probe, fit, search, prove.

On a device that is here the loop probes the configuration that the models hold most for, learns
from it, and goes on until none left is expected to beat the best one measured, or the budget is
spent. Its winner has run: it is proved. For a card that is not here the search's winner is traced,
and said to be.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_advisor.advisor import elsewhere, traces
from lora_advisor.advisor.arms import short_form
from lora_advisor.advisor.attention import known_attention, learn_attention
from lora_advisor.advisor.baseline import baseline_config
from lora_advisor.advisor.conclusion import conclude, nothing_fits
from lora_advisor.advisor.front import front
from lora_advisor.advisor.predictor import Predictor
from lora_advisor.advisor.probing import (
    check_budget,
    no_time_for_engine,
    probe_loop,
    prove,
    with_results,
)
from lora_advisor.advisor.savings import with_savings
from lora_advisor.advisor.scaling import for_all_cards, one_card, set_aside
from lora_advisor.advisor.search import SearchResult, search
from lora_advisor.advisor.session import Probe, Say, Session, prober, reuse, run
from lora_advisor.advisor.space import build_space
from lora_advisor.advisor.study_file import check_study_file, get_ready, write_study
from lora_advisor.advisor.trace_cache import TraceCache
from lora_advisor.probes.architectures import Architecture, resolve_architecture
from lora_advisor.probes.cards import Card, card_of, find_card
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import AdvisorError
from lora_advisor.probes.forkserver import ForkServer
from lora_advisor.probes.machine import GIB, detect_machine, detect_stack
from lora_advisor.probes.plan import Candidate, DataSummary, Plan
from lora_advisor.probes.prices import Price
from lora_advisor.probes.record import ProbeResult, check_writable
from lora_advisor.probes.runner import capped_bytes, context_bytes_of
from lora_advisor.probes.spec import Spec

if TYPE_CHECKING:
    import optuna


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
    own_record: bool = False,
    prices: Sequence[Price] | None = None,
    imported: Sequence[ProbeResult] = (),
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
        own_record: Whether the user named the record: then one of elsewhere is refused.
        prices: What cards cost to rent; with None those of the package, for long trainings only.
        imported: Runs of others; those of the very card, where it is not here, teach the models.

    Raises:
        NothingFitsError: No configuration fits.
        AdvisorError: As the parts raise it.
    """
    wanted, spec = spec, one_card(spec) if spec.gpus > 1 else spec
    architecture = resolve_architecture(spec.model, trust_remote_code=spec.trust_remote_code)
    server = None
    if spec.device == "cuda" or _will_trace(spec, architecture, cache):
        # Its imports go on while the first questions are answered here.
        server = ForkServer.of(architecture)
        if study_file is not None:
            get_ready()
    session = _open(spec, architecture, say, cache, server)
    session.predictor.store.server = server
    session.prices = None if prices is None else tuple(prices)
    try:
        if study_file is not None:
            check_writable(study_file)
            check_study_file(study_file, session.machine, session.stack)
        if spec.device != "none":
            check_writable(record)
            session.probe = probe or prober(
                session, record, server if spec.device == "cuda" else None
            )
            if not fresh:
                reuse(session, record, strict=own_record)
        elsewhere.teach(session, imported)
        aside = set_aside(session) if wanted.gpus > 1 else 0
        plan, study = _plan(session, data, aside)
        if wanted.gpus > 1:
            plan = for_all_cards(session, plan, wanted, aside)
    finally:
        session.predictor.store.close()
        if server is not None:
            server.close()
    if study_file is not None:
        try:
            write_study(study_file, study, plan, session.predictor.results)
        except AdvisorError as error:  # what the plan was probed for is not lost with the study
            say(f"the search's study is not kept: {error}")
    return plan


def _will_trace(spec: Spec, architecture: Architecture, cache: Path | None) -> bool:
    """Whether there is much to trace: of a model that this cache and process know nothing of."""
    if (os.cpu_count() or 1) < 2 or traces.has_imported() or spec.trust_remote_code:
        return False
    return known_attention(architecture, TraceCache(cache)) is None


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
    traced = TraceCache(cache)
    if server is not None and not spec.trust_remote_code:
        learn_attention(architecture, traced, server)
    space = build_space(spec, machine, stack, card, cache=traced)
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


def _plan(session: Session, data: DataSummary | None, aside: int) -> tuple[Plan, optuna.Study]:
    session.say("searching the space over the models")
    beside = _baseline_config(session)
    found = search(
        session.space,
        session.predictor,
        objective=session.spec.objective,
        seed=session.spec.seed,
        free_trials=session.spec.free_trials,
        beside=[beside],
    )
    found = _with_engines(session, found, several=aside > 0)
    session.trials = found.trials
    configs = [candidate.config for candidate in found.feasible]
    longer = _longer(session) if session.spec.longer else ()
    baseline = _baseline(session, beside)
    if session.probe is not None:
        if baseline is not None and _is_as_fixed(session, baseline.config):
            configs.append(baseline.config)
        probe_loop(session, configs)
        chosen = prove(session, configs)
    else:
        safe = [c for c in found.feasible if c.prediction.verdict == "fits"]
        chosen = safe[0] if safe else None
    if chosen is None:
        left = f" ({aside / GIB:.2f} of it are left to DDP and NCCL)" if aside else ""
        failed = [r.detail for r in session.predictor.results if r.outcome == "failed"]
        left += f" A run failed, and not for memory: {failed[-1]}." if failed else ""
        raise NothingFitsError(nothing_fits(session, found.infeasible, configs) + left)
    plan = conclude(session, chosen, baseline, configs, found.infeasible, data)
    plan = dataclasses.replace(plan, front=front([*plan.front, *longer]))
    return with_savings(session, plan), found.study


def _with_engines(session: Session, found: SearchResult, *, several: bool) -> SearchResult:
    """Add what another engine could run, where one is installed and may be the plan.

    Args:
        session: The plan's; its space is told why an engine is left out after all.
        found: What our own steps come to.
        several: Whether several cards are to train.
    """
    engine = session.space.engine
    if session.probe is None or engine is None:
        return found
    why = "with it one card trains here" if several else no_time_for_engine(session)
    if why is not None:
        excluded = (*session.space.excluded, (f"trainer {engine}", why))
        session.space = dataclasses.replace(session.space, excluded=excluded, engine=None)
        return found
    spec = dataclasses.replace(session.spec, fixed={**session.spec.fixed, "trainer": engine})
    space = build_space(spec, session.machine, session.stack, session.card)
    more = search(space, session.predictor, objective=spec.objective, seed=spec.seed, free_trials=0)
    return dataclasses.replace(
        found,
        feasible=found.feasible + more.feasible,
        infeasible=found.infeasible + more.infeasible,
    )


def _longer(session: Session) -> tuple[Candidate, ...]:
    """Return what fits with longer sequences, a micro-batch of one."""
    spec = dataclasses.replace(session.spec, objective="seq_len")
    space = build_space(spec, session.machine, session.stack, session.card)
    found = search(space, session.predictor, objective="seq_len", seed=spec.seed, free_trials=0)
    return tuple(c for c in found.feasible if c.prediction.verdict == "fits")


def _is_as_fixed(session: Session, config: RunConfig) -> bool:
    """Whether a configuration keeps what the user fixed, so that it may be the plan itself."""
    return all(getattr(config, knob) == value for knob, value in session.spec.fixed.items())


def _baseline_config(session: Session) -> RunConfig:
    precision = session.space.axes["precision"][0]
    return baseline_config(session.spec, precision, cache=session.predictor.store.cache)


def _baseline(session: Session, config: RunConfig) -> Candidate | None:
    """Return what the user would run otherwise, probed if there is a device."""
    if session.probe is not None:
        check_budget(session, config)
        run(session, short_form(config), "baseline")
    return with_results(session, [session.predictor.candidate(config)])[0]
