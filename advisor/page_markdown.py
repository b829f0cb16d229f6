"""A report as Markdown for a pull request: the answer and the tables."""

from __future__ import annotations

from lora_advisor.advisor.arms import describe
from lora_advisor.advisor.fitmap import FitMap
from lora_advisor.advisor.markdown import plain, table
from lora_advisor.advisor.page import config_of, title_of
from lora_advisor.advisor.page_map import largest_table
from lora_advisor.advisor.page_memory import STAGES, parts_of
from lora_advisor.advisor.page_numbers import Fact, plan_facts
from lora_advisor.advisor.page_run import events_rows, notes_of, run_facts, status_text
from lora_advisor.advisor.page_samples import SAID, samples_table, unknown
from lora_advisor.advisor.page_source import Run, Source
from lora_advisor.advisor.page_tables import (
    candidates_table,
    config_table,
    data_table,
    long_words,
    measured_table,
    prices_table,
    provenance_table,
    rentals_table,
    savings_table,
    scaling_table,
    trail_table,
    training_table,
    versions_table,
)
from lora_advisor.advisor.page_words import Table, sentence
from lora_advisor.advisor.report import KNOWN
from lora_advisor.advisor.report_savings import NO_RENTAL, RENTING
from lora_advisor.probes.machine import GIB
from lora_advisor.probes.plan import Plan


def report_markdown(source: Source, drawn: FitMap | None) -> str:
    """Return the report; `drawn` is None where it was not found out which sizes fit."""
    plan, run, config = source.plan, source.run, config_of(source)
    parts = [f"## {plain(title_of(source))}"]
    if run is not None:
        parts.append(plain(status_text(run)[0]))
    elif plan is not None:
        parts.append(plain(KNOWN[plan.chosen.evidence]))
    if config is not None:
        parts.append(f"**{plain(describe(config))}**")
    facts = run_facts(source) if run is not None else plan_facts(plan) if plan else []
    parts.append(_facts(facts))
    if run is not None:
        parts += _titled("Predicted beside measured", training_table(run))
        parts += [f"* {plain(words)}" for words in notes_of(run)]
        events = events_rows(run)
        if events:
            happened = Table(headers=("after step", "event", ""), rows=tuple(events))
            parts += _titled("What happened", happened)
        parts += _samples(run)
    if plan is not None:
        parts += _plan(source, plan, drawn)
    if config is not None:
        parts += _folded("Configuration", config_table(config))
    parts += _folded("Where the figures come from", provenance_table(source))
    parts += _folded("Versions", versions_table(source))
    return "\n\n".join(part for part in parts if part) + "\n"


def _plan(source: Source, plan: Plan, drawn: FitMap | None) -> list[str]:
    parts = [] if source.run is None else ["### The plan", _facts(plan_facts(plan))]
    if plan.scaling is not None:
        name = f"On {plan.scaling.gpus} such cards (predicted; all else is one card's share)"
        parts += _titled(name, scaling_table(plan))
    parts += _titled("Predicted and measured", measured_table(plan))
    if plan.runners_up:
        parts += _titled("Runners-up", candidates_table(plan.runners_up, "configuration"))
    if plan.rejected:
        parts += _folded("Cannot run", candidates_table(plan.rejected, "configuration"))
    data = data_table(plan)
    if data is not None:
        parts += _titled("The data", data)
    parts += _shorter(plan)
    if source.trail:
        parts += _folded("What was probed, in order", trail_table(source.trail))
    memory = memory_table(plan)
    if memory is not None:
        parts += _folded("Memory at the peak, predicted", memory)
    if drawn is not None:
        parts += _folded("The largest micro-batch of each length (traced)", largest_table(drawn))
    return parts


def _samples(run: Run) -> list[str]:
    """Return what the models say, in short; nothing where nothing was asked."""
    if isinstance(run.samples, str):
        return [f"### {SAID}", plain(unknown(run.samples))]
    return _folded(SAID, samples_table(run.samples)) if run.samples else []


def _shorter(plan: Plan) -> list[str]:
    """Return what would make a long training shorter, and what renting costs."""
    changes, rented = savings_table(plan), rentals_table(plan)
    parts = []
    if changes is not None:
        parts += ["### What would make the training shorter", plain(long_words(plan))]
        parts.append(_table(changes))
    if rented is not None:
        parts += ["### On a rented card", plain(sentence(RENTING)), _table(rented)]
        parts += _folded("Where the prices are from", prices_table(plan))
    elif changes is not None:
        parts.append(plain(sentence(NO_RENTAL)))
    return parts


def memory_table(plan: Plan) -> Table | None:
    """Return parts and stages of the predicted memory; None where they are not known."""
    parts = parts_of(plan)
    if not parts:
        return None
    phases = plan.chosen.prediction.memory.phases
    rows = [(name, f"{size / GIB:.2f}") for name, size in parts]
    rows += [
        (f"live tensors, stage {name}", f"{phases[key] / GIB:.2f}")
        for key, name in STAGES.items()
        if key in phases
    ]
    return Table(headers=("part", "GiB"), rows=tuple(rows), numbers=(1,))


def _facts(facts: list[Fact]) -> str:
    if not facts:
        return ""
    rows = [(fact.name, fact.value, fact.note, fact.known) for fact in facts]
    return _table(Table(headers=("", "value", "", "known how"), rows=tuple(rows)))


def _table(told: Table) -> str:
    return table(told.rows, told.headers or ("", ""))


def _titled(name: str, told: Table | None) -> list[str]:
    return [] if told is None else [f"### {name}", _table(told)]


def _folded(name: str, told: Table) -> list[str]:
    return [f"<details><summary>{name}</summary>", _table(told), "</details>"]
