"""What a report says in tables: rows of words, for the page and for its Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata

from lora_advisor.advisor.arms import describe
from lora_advisor.advisor.page_numbers import range_text
from lora_advisor.advisor.page_source import Run, Source
from lora_advisor.advisor.page_speed import expected_known
from lora_advisor.advisor.page_words import Table, sentence
from lora_advisor.advisor.report import config_rows, duration, gib
from lora_advisor.advisor.report_data import batching_rows
from lora_advisor.advisor.report_savings import (
    RENTAL_HEADERS,
    SAVINGS_HEADERS,
    how_long,
    price_rows,
    rental_rows,
    savings_rows,
)
from lora_advisor.advisor.report_scaling import scaling_rows
from lora_advisor.advisor.report_training import figures
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.machine import GIB, Stack
from lora_advisor.probes.plan import Candidate, Plan
from lora_advisor.probes.trail import Probed

_UNKNOWN = "unknown"


def config_table(config: RunConfig) -> Table:
    """Return what to run, knob by knob."""
    rows = [*config_rows(config), ("attention", config.attention)]
    return Table(headers=(), rows=tuple(rows))


def measured_table(plan: Plan) -> Table:
    """Return what was predicted of the plan beside what its proof measured."""
    chosen, ran = plan.chosen, plan.chosen.measured
    memory, speed = chosen.prediction.memory, chosen.prediction.tokens_per_s
    energy = chosen.prediction.joules_per_token

    def size(value: int | None) -> str:
        return "not measured" if value is None else gib(value)

    at_most = f"{gib(memory.process_bytes)}, at most {gib(memory.process_upper_bytes)}"
    rows = [
        ("tokens/s, padding included",
         _UNKNOWN if speed is None else f"{speed.value:,.0f} ({range_text(speed)})",
         _number(ran.tokens_per_s if ran else None)),
        ("live tensors", gib(memory.allocated_bytes), size(ran.allocated_bytes if ran else None)),
        ("held by the allocator", gib(memory.reserved_bytes),
         size(ran.reserved_bytes if ran else None)),
        ("process", at_most, size(ran.process_bytes if ran else None)),
        ("joules a token",
         _UNKNOWN if energy is None else f"{energy.value:.3g} ({energy.low:.2g} to "
         f"{energy.high:.2g})",
         "not measured" if ran is None or ran.joules_per_token is None
         else f"{ran.joules_per_token:.3g}"),
    ]  # fmt: skip
    predicted = "predicted" if ran is None else "the models, its own run counted"
    return Table(headers=("", predicted, "measured"), rows=tuple(rows))


def candidates_table(candidates: Sequence[Candidate], why: str) -> Table:
    """Return what else was looked at, and why it was not taken."""
    rows = []
    for candidate in candidates:
        speed = candidate.tokens_per_s
        ran = candidate.measured
        held = candidate.prediction.memory.process_bytes
        if ran is not None and ran.process_bytes is not None:
            held = ran.process_bytes
        rows.append(
            (
                describe(candidate.config),
                _UNKNOWN if speed is None else f"{speed:,.0f}",
                f"{held / GIB:.2f}",
                candidate.reason or "",
            )
        )
    headers = (why, "tokens/s", "GiB", "why not")
    return Table(headers=headers, rows=tuple(rows), numbers=(1, 2), whole=0)


def trail_table(trail: Sequence[Probed]) -> Table:
    """Return what was probed, in order, with what was expected and what came."""
    rows = []
    for number, probed in enumerate(trail, start=1):
        expected = probed.expected_tokens_per_s
        part = "" if probed.layers is None else f", {probed.layers} of its layers"
        foretold = "not kept" if probed.expected_process_bytes is None else _UNKNOWN
        if expected is not None:
            foretold = f"{expected.value:,.0f} ({range_text(expected)}), {expected_known(probed)}"
        rows.append(
            (
                str(number),
                probed.why or "not kept",
                describe(probed.config) + part,
                foretold,
                _number(probed.tokens_per_s),
                "" if probed.process_bytes is None else f"{probed.process_bytes / GIB:.2f}",
                _outcome(probed),
            )
        )
    headers = ("", "why", "configuration", "predicted tokens/s", "measured", "GiB", "outcome")
    return Table(headers=headers, rows=tuple(rows), numbers=(0, 4, 5), whole=2)


def _outcome(probed: Probed) -> str:
    told = "ran" if probed.outcome == "ok" else probed.outcome.replace("_", " ")
    return told + (f"; in doubt: {', '.join(probed.doubts)}" if probed.doubts else "")


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:,.0f}"


def data_table(plan: Plan) -> Table | None:
    """Return what a pass over the data costs; None for a plan without such figures."""
    if plan.data is None or not plan.batchings:
        return None
    headers = ("batches", "tokens/s without padding", "padding", "steps", "one epoch")
    rows = tuple(tuple(row) for row in batching_rows(plan))
    return Table(headers=headers, rows=rows, numbers=(2, 3))


def savings_table(plan: Plan) -> Table | None:
    """Return what would make a long training shorter; None for nothing."""
    rows = tuple(savings_rows(plan))
    return Table(headers=SAVINGS_HEADERS, rows=rows, whole=0) if rows else None


def long_words(plan: Plan) -> str:
    """Say that the training is long, and how it is known what would change that."""
    known = "predicted, not measured"
    return sentence(f"{how_long(plan)}; below, what each change alone would make of that ({known})")


def rentals_table(plan: Plan) -> Table | None:
    """Return what the training would take and cost on rented cards; None for none."""
    rows = tuple(rental_rows(plan))
    return Table(headers=RENTAL_HEADERS, rows=rows, numbers=(4,), whole=0) if rows else None


def prices_table(plan: Plan) -> Table:
    """Return where the prices of rented cards are from."""
    return Table(headers=("card", "as of", "source"), rows=tuple(price_rows(plan)), whole=0)


def scaling_table(plan: Plan) -> Table | None:
    """Return what several cards come to together; None for one card."""
    rows = tuple(scaling_rows(plan))
    return Table(headers=(), rows=rows) if rows else None


def training_table(run: Run) -> Table | None:
    """Return what a training measured beside what the plan had promised; None before its end."""
    result = run.result
    if result is None:
        return None
    rows = tuple(tuple(row) for row in figures(result))
    return Table(headers=("", "predicted", "measured", "difference"), rows=rows)


def provenance_table(source: Source) -> Table:
    """Return where the figures come from: file, machine, wishes, effort."""
    rows: list[tuple[str, str]] = [("made of", source.name)]
    plan, run = source.plan, source.run
    if plan is not None:
        rows += _plan_rows(plan, source.trail)
    if run is not None:
        rows.append(("trained on", run.device or _UNKNOWN))
        if run.result is not None:
            rows.append(("data", f"{run.result.data.name}, sha256 {run.result.data_sha256[:16]}"))
    rows.append(("report by", f"lora-advisor {metadata.version('lora-advisor')}"))
    return Table(headers=(), rows=tuple(rows))


def _plan_rows(plan: Plan, trail: Sequence[Probed]) -> list[tuple[str, str]]:
    spec, machine = plan.spec, plan.machine
    here = " (not there: predicted for it)" if machine.kind == "card" else ""
    rows = [("machine", f"{machine.name}{here}, {gib(machine.memory_bytes)}")]
    if machine.host:
        rows.append(("host", machine.host))
    if machine.driver:
        rows.append(("driver", f"{machine.driver}, compute capability {machine.capability}"))
    rows.append(("model", plan.architecture.name))
    if plan.architecture.source:
        rows.append(("its figures", plan.architecture.source))
    fixed = ", ".join(f"{name} {value}" for name, value in spec.fixed.items()) or "nothing"
    rows += [
        ("asked for", f"{gib(spec.vram_bytes)} less {gib(spec.reserve_bytes)}, {spec.seq_len:,} "
         f"tokens, effective batch {spec.effective_batch}, {spec.objective}"),
        ("fixed by the user", fixed),
        ("effort", f"{plan.trials} configurations looked at and {plan.probes} probes "
         f"({duration(plan.probing_s)}) in {duration(plan.wall_s)}, {plan.reused} earlier probes "
         f"reused, budget {duration(spec.probe_budget_s)}, seed {spec.seed}"),
    ]  # fmt: skip
    times = [probed.started_at for probed in trail if probed.started_at]
    if times:
        rows.append(("probed", f"{min(times)} to {max(times)}"))
    if plan.excluded:
        rows.append(("left out", "; ".join(f"{what} ({why})" for what, why in plan.excluded)))
    return rows


def versions_table(source: Source) -> Table:
    """Return the versions of plan and training."""
    stacks: list[tuple[str, Stack]] = []
    if source.plan is not None:
        stacks.append(("plan", source.plan.stack))
    if source.run is not None and source.run.stack is not None:
        stacks.append(("training", source.run.stack))
    names = list(stacks[0][1].packages()) if stacks else []
    rows = tuple(
        (name.replace("_", " "), *(stack.to_json()[name] or "not installed" for _, stack in stacks))
        for name in names
    )
    return Table(headers=("package", *(name for name, _ in stacks)), rows=rows)
