"""What a plan does not hold and a report wants: computed again from traces, and said to be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_advisor.advisor.fitmap import FitMap, default_seq_lens, fit_map
from lora_advisor.advisor.predictor import Predictor
from lora_advisor.probes.cards import card_of, find_card
from lora_advisor.probes.errors import UntraceableError
from lora_advisor.probes.plan import Plan
from lora_advisor.probes.record import ProbeResult
from lora_advisor.probes.trail import Probed

#: Rows of the map; the chosen micro-batch comes to them.
_MICRO_BATCHES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48)
#: Columns up to so many times the chosen length, and how many at most.
_TIMES, _COLUMNS = 4, 24


def predictor_of(plan: Plan, cache: Path | None) -> Predictor:
    """Return the models as they stood before the plan's first probe."""
    card = find_card(plan.spec.gpu) if plan.spec.gpu is not None else card_of(plan.machine)
    return Predictor.start(
        plan.architecture,
        plan.machine,
        card,
        limit_bytes=plan.spec.vram_bytes - plan.spec.reserve_bytes,
        context_bytes=plan.context_bytes if plan.machine.kind == "cuda" else None,
        cache=cache,
    )


def trail_from_record(
    plan: Plan, results: Sequence[ProbeResult], predictor: Predictor
) -> tuple[Probed, ...]:
    """Return a plan's probes from its record, with what the models say before each.

    Args:
        plan: The plan.
        results: The record, in order; lines of another machine, stack or model are left out.
        predictor: The models before the first.
    """
    mine = [
        r for r in results
        if r.machine == plan.machine and r.stack == plan.stack
        and r.architecture == plan.architecture.fingerprint
    ]  # fmt: skip
    trail = []
    for number, result in enumerate(mine):
        trail.append(
            Probed.of(result, _why(plan, result, number), predictor.predict(result.config))
        )
        predictor = predictor.learn([result])
    return tuple(trail)


def _why(plan: Plan, result: ProbeResult, number: int) -> str:
    """Say why a probe ran, as far as the plan tells."""
    baseline = None if plan.baseline is None else plan.baseline.measured
    if result == baseline:
        return "baseline"
    return "proof" if result == plan.chosen.measured and number else ""


def _measured(plan: Plan) -> list[ProbeResult]:
    found = [plan.chosen, *([plan.baseline] if plan.baseline else []), *plan.runners_up]
    return [c.measured for c in found if c.measured is not None]


def map_of(plan: Plan, predictor: Predictor) -> tuple[FitMap | None, str | None]:
    """Return which sizes of the chosen configuration fit; where its step is not traced, why not.

    Compiled layers are allocated otherwise at each size, so that few traces do not tell all sizes:
    the map is then that of the same configuration without compilation.
    """
    config = plan.chosen.config.replace(compile="off")
    if plan.machine.kind == "cpu":  # what Python holds there is known from probes alone
        predictor = predictor.learn(_measured(plan))
    lengths = [
        n for n in default_seq_lens(plan.architecture) if n <= _TIMES * config.seq_len
    ] or [config.seq_len]  # fmt: skip
    lengths = lengths[:: -(-len(lengths) // _COLUMNS)]
    try:
        drawn = fit_map(
            config,
            predictor,
            micro_batches=sorted({*_MICRO_BATCHES, config.micro_batch}),
            seq_lens=sorted({*lengths, config.seq_len}),
        )
    except UntraceableError as error:
        return None, str(error)
    return drawn, None
