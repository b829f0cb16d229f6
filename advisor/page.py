"""A report as one page of HTML that needs nothing else: the answer first, then what it rests on."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from lora_advisor.advisor.arms import describe
from lora_advisor.advisor.fitmap import FitMap
from lora_advisor.advisor.page_html import document, table, tag
from lora_advisor.advisor.page_map import largest_table, map_section
from lora_advisor.advisor.page_memory import memory_section
from lora_advisor.advisor.page_numbers import Fact, plan_facts
from lora_advisor.advisor.page_run import (
    events_rows,
    notes_of,
    predicted_of,
    run_facts,
    status_text,
)
from lora_advisor.advisor.page_samples import samples_section
from lora_advisor.advisor.page_source import Run, Source
from lora_advisor.advisor.page_speed import foretold_section, tradeoff_section
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
from lora_advisor.advisor.page_training import curves_section
from lora_advisor.advisor.page_words import Table, sentence
from lora_advisor.advisor.report import KNOWN, gib
from lora_advisor.advisor.report_data import lengths_text
from lora_advisor.advisor.report_savings import NO_RENTAL, OTHER_PRICES, RENTING
from lora_advisor.advisor.report_scaling import launcher
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.plan import Plan

_COLOURS = {"yes": "good", "no": "bad", "uncertain": "doubt"}


def page(source: Source, drawn: FitMap | None, *, no_map: str | None = None) -> str:
    """Return the page.

    Args:
        source: The plan, the training, or both.
        drawn: Which sizes fit; None where that was not found out.
        no_map: Why there is no map.
    """
    parts = _answer(source)
    if source.run is not None:
        parts += _training(source, source.run)
    if source.plan is not None:
        parts += _plan(source, source.plan, drawn, no_map)
    parts += [
        tag("h2", "Where the figures come from"),
        _pairs(provenance_table(source)),
        tag("h3", "Versions"),
        _table(versions_table(source)),
        tag("footer", "Every figure says how it is known. ", [
            tag("span", tag("span", name, class_=f"known {name}"), f" {words}. ")
            for name, words in _LADDER]),
    ]  # fmt: skip
    return document(title_of(source), parts)


_LADDER = (
    ("traced", "a real training step on fake tensors: a prediction"),
    ("probed elsewhere", "predicted from imported runs of such a card in another machine"),
    ("probed", "predicted from short runs of neighbouring configurations there"),
    ("proved", "this configuration ran under the limit"),
    ("measured", "came out of a run"),
)


def title_of(source: Source) -> str:
    """Return what the report is about, in one line."""
    plan, run = source.plan, source.run
    if run is not None:
        model = plan.architecture.name if plan is not None else _model_of(run)
        return f"Training {run.name}: {model}"
    assert plan is not None
    here = " (not there: predicted)" if plan.machine.kind == "card" else ""
    return f"{plan.architecture.name} on {plan.machine.name}{here}, {gib(plan.spec.vram_bytes)}"


def _model_of(run: Run) -> str:
    if run.result is not None:
        return run.result.model
    return "a model that the folder does not name" if run.config is None else run.config.model


def _answer(source: Source) -> list[Element]:
    plan, run = source.plan, source.run
    found = [tag("h1", title_of(source))]
    config = config_of(source)
    if run is not None:
        words, kind = status_text(run)
        found.append(tag("p", f"Training run {run.name} on {run.device or 'an unknown device'}",
                         class_="under"))  # fmt: skip
        found.append(tag("p", words, class_="note" if kind == "doubt" else f"note {kind}"))
        found += [_facts(run_facts(source))]
    else:
        assert plan is not None
        found.append(tag("p", KNOWN[plan.chosen.evidence], class_="under"))
    if config is not None:
        name = "What ran" if run is not None else "What to run"
        found.append(tag("p", tag("strong", f"{name}: "), describe(config), class_="run"))
    if plan is not None and run is None:
        found.append(_facts(plan_facts(plan)))
        found.append(tag("pre", tag("code", command_of(source)), class_="command"))
    if config is not None:
        found.append(_pairs(config_table(config)))
    return found


def config_of(source: Source) -> RunConfig | None:
    """Return the configuration that the report is about."""
    if source.run is not None and source.run.config is not None:
        return source.run.config
    return None if source.plan is None else source.plan.chosen.config


def command_of(source: Source) -> str:
    """Return the command that trains with a plan."""
    import shlex

    data = None if source.plan is None else source.plan.spec.data
    named = "" if data is not None else " --data YOUR_DATA"
    scaling = None if source.plan is None else source.plan.scaling
    program = "lora-advisor" if scaling is None else launcher(scaling.gpus)
    return f"{program} train {shlex.quote(source.name)}{named} --output runs/first"


def _training(source: Source, run: Run) -> list[Element]:
    predicted = predicted_of(source)
    found = [tag("h2", "The training"), *curves_section(run, predicted)]
    beside = training_table(run)
    if beside is not None:
        found += [tag("h3", "Predicted beside measured"), _table(beside)]
    notes = notes_of(run)
    if notes:
        found.append(tag("ul", [tag("li", words) for words in notes]))
    events = events_rows(run)
    if events:
        told = Table(headers=("after step", "event", ""), rows=tuple(events), numbers=(0,))
        found += [tag("h3", "What happened"), _table(told)]
    return found + samples_section(run.samples)


def _plan(source: Source, plan: Plan, drawn: FitMap | None, no_map: str | None) -> list[Element]:
    found: list[Element] = []
    if source.run is not None:
        found += [tag("h2", "The plan"), tag("p", KNOWN[plan.chosen.evidence], class_="under"),
                  _facts(plan_facts(plan))]  # fmt: skip
    found += _scaling(plan)
    found += [tag("h2", "Memory"), *memory_section(plan)]
    found += [tag("h2", "What fits")]
    if drawn is None:
        found.append(tag("p", no_map or "The map was not asked for.", class_="missing"))
    else:
        found += map_section(drawn, plan)
        found.append(_folded("The largest micro-batch of each length", largest_table(drawn)))
    found += [tag("h2", "Speed against memory"), *tradeoff_section(source)]
    for name, others in (("Runners-up", plan.runners_up), ("Cannot run", plan.rejected)):
        if others:
            found += [tag("h3", name), _table(candidates_table(others, "configuration"))]
    found += [tag("h2", "Predicted against measured"), *foretold_section(source),
              tag("h3", "The plan itself"), _table(measured_table(plan))]  # fmt: skip
    if source.trail:
        found += [tag("h2", "What was probed, in order"), _table(trail_table(source.trail))]
    return found + _data(plan) + _shorter(plan)


def _scaling(plan: Plan) -> list[Element]:
    """Return what several cards come to together; nothing for one card."""
    told = scaling_table(plan)
    if plan.scaling is None or told is None:
        return []
    words = (
        "Predicted, not measured: probes run on one card. Fit, memory and tokens/s of the plan "
        "elsewhere on this page are those of one card's share of a step."
    )
    return [tag("h2", f"On {plan.scaling.gpus} such cards"), tag("p", words), _pairs(told)]


def _shorter(plan: Plan) -> list[Element]:
    """Return what would make a long training shorter, and what renting costs."""
    changes, rented = savings_table(plan), rentals_table(plan)
    if changes is None and rented is None:
        return []
    found = [tag("h2", "What would make the training shorter")]
    if changes is not None:
        found += [tag("p", long_words(plan)), _table(changes)]
    if rented is None:
        return [*found, tag("p", sentence(NO_RENTAL))]
    found += [tag("h3", "On a rented card"), tag("p", sentence(RENTING)), _table(rented)]
    return [*found, tag("h3", "Where the prices are from"), _table(prices_table(plan)),
            tag("p", f"{OTHER_PRICES}.")]  # fmt: skip


def _data(plan: Plan) -> list[Element]:
    if plan.data is None:
        return []
    told = data_table(plan)
    rows = f"{plan.data.rows:,} {'pairs' if plan.data.sequences > 1 else 'rows'}"
    words = f"{rows}, {plan.data.tokens:,} tokens, {plan.data.truncated:,} cut."
    found = [tag("h2", "The data"), tag("p", words)]
    if told is not None:
        found.append(_table(told))
    if plan.data.length_counts:
        words, _, bars = lengths_text(plan.data).partition("\n")
        found += [tag("p", words), tag("pre", tag("code", bars))]
    return found


def _facts(facts: Sequence[Fact]) -> Element:
    return tag(
        "div",
        [
            tag("dl", tag("dt", fact.name, " ", tag("span", fact.known,
                class_=f"known {fact.known}")),
                tag("dd", fact.value, class_=_COLOURS.get(fact.value)),
                tag("dd", fact.note, class_="small"), class_="fact")
            for fact in facts
        ],
        class_="facts",
    )  # fmt: skip


def _table(told: Table) -> Element:
    return table(told.headers, told.rows, numbers=told.numbers, whole=told.whole)


def _pairs(told: Table) -> Element:
    rows = [tag("tr", tag("th", name, scope="row"), tag("td", value)) for name, value in told.rows]
    return tag("div", tag("table", tag("tbody", rows), class_="pairs"), class_="scroll")


def _folded(name: str, told: Table) -> Element:
    rows = table(told.headers, told.rows, numbers=told.numbers, class_="slim")
    return tag("details", tag("summary", name), rows)
