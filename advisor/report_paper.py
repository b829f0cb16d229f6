"""The section of a bench's report that stands beside the paper's table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from tabulate import tabulate

from lora_advisor.advisor import paper
from lora_advisor.advisor.bench import Bench
from lora_advisor.advisor.bench_study import Study
from lora_advisor.advisor.effects import Estimate
from lora_advisor.advisor.report_effects import ratio_text
from lora_advisor.probes.cards import card_of
from lora_advisor.probes.machine import GIB

_TABLE = "github"


def paper_section(study: Study) -> list[str]:
    """Write the paper's rows beside the same configurations here, and what each change does."""
    lines = ["## Beside the paper's table", "", f"{paper.SOURCE}: {paper.MODEL} on an "
             f"{paper.CARD}. {paper.NOTE}", ""]  # fmt: skip
    methods = study.bench.design.factors["method"]
    here = _cells(study)
    lines += [_rows(study, methods, here), ""]
    if not any((method, *run.levels) in here for run in paper.RUNS for method in methods):
        lines += ["None of these configurations was measured here, so nothing is compared.", ""]
        return lines
    lines += ["### One change at a time", ""]
    lines += [_ways(study, methods), ""]
    lines += [
        "The paper changes all of a block at once; here each change is made alone, in this order, "
        "everything else equal. The changes of a block multiply to its total. Where factors depend "
        "on each other another order gives other shares of the same total.",
        "",
    ]
    return [*lines, *_limits(study)]


Cells = Mapping[tuple[str, ...], Mapping[str, float]]


def _cells(study: Study) -> Cells:
    """Return the median of each figure of each cell."""
    groups: dict[tuple[str, ...], list[Mapping[str, float]]] = {}
    for seen in study.observations:
        groups.setdefault(seen.levels, []).append(seen.values)
    return {
        levels: {
            name: statistics.median(values[name] for values in group if name in values)
            for name in group[0]
        }
        for levels, group in groups.items()
    }


def _rows(study: Study, methods: Sequence[str], here: Cells) -> str:
    """Write the paper's rows, and the medians of the same cells here."""
    headers = ["run", "configuration", "paper: tokens/s", "s per 10k", "MB", "J/token", "W"]
    for method in methods:
        headers += [f"{method} here: tokens/s", "process GiB", "J/token"]
    rows = []
    for run in paper.RUNS:
        row = [run.name, ", ".join(run.levels), f"{run.tokens_per_s:.1f}"]
        row += [f"{1e4 / run.tokens_per_s:.1f}", f"{run.memory_mb:,.0f}"]
        row += [f"{run.joules_per_token:.2f}", f"{run.watts:.0f}"]
        for method in methods:
            values = here.get((method, *run.levels), {})
            speed = values.get("tokens_per_s")
            row += [
                _state(study, (method, *run.levels)) if speed is None else f"{speed:,.0f}",
                _number(values.get("process_bytes"), ".2f", GIB),
                _number(values.get("joules_per_token"), ".4f"),
            ]
        rows.append(row)
    return tabulate(rows, headers=headers, tablefmt=_TABLE, disable_numparse=True)


def _state(study: Study, levels: tuple[str, ...]) -> str:
    """Write why a configuration has no figures here."""
    cells = [cell for cell in study.bench.design.cells if cell.levels == levels]
    return study.bench.state_of(cells[0]) if cells else "not in this bench"


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return "-" if value is None else f"{value / unit:{form}}"


def _ways(study: Study, methods: Sequence[str]) -> str:
    headers = ["tokens/s", "changed", "paper", *(f"{method} here" for method in methods)]
    rows = []
    for way in study.ways:
        name = f"run {way.start.name} to {way.end.name}"
        rows.append([name, "all at once", f"x{way.paper_ratio:.2f}",
                     *(ratio_text(way.ratio[method]) for method in methods)])  # fmt: skip
        for step in way.steps:
            cells = [ratio_text(step.ratio[method]) for method in methods]
            rows.append(["", step.changed, "not told", *cells])
    return tabulate(rows, headers=headers, tablefmt=_TABLE, disable_numparse=True)


def _limits(study: Study) -> list[str]:
    """Write what can be compared and what cannot, each with the figures it follows from."""
    bench = study.bench
    watts = [run.watts for run in paper.RUNS]
    used = [run.memory_mb for run in paper.RUNS]
    tokens = [run.micro_batch * run.seq_len for run in paper.RUNS]
    lines = [
        "### What can be compared",
        "",
        f"* Ratios within each table, not levels: {_apart(bench)}.",
        f"* Energy in the paper is speed under another name: its rows come to {min(watts):.0f} to "
        f"{max(watts):.0f} W, one power for all. How it is known here stands above.",
        f"* Memory in the paper: run 3 holds {100 * used[2] / used[1]:.0f} % of run 2 with "
        f"{100 * tokens[2] / tokens[1]:.0f} % of its tokens, both within 8 GB; what a card "
        "holds when it is full is not what a run needs.",
        f"* The paper does not say: {'; '.join(paper.UNKNOWN)}.",
    ]
    lines += _opposites(study)
    return [*lines, ""]


def _apart(bench: Bench) -> str:
    """Write what is not the same there and here."""
    base, card = bench.design.base, card_of(bench.machine)
    parts = []
    if card is None or card.key != paper.CARD_KEY:
        parts.append(f"the card is another ({bench.machine.name} here)")
    if paper.BUNDLED not in bench.architecture.name.lower():
        parts.append(f"the model is another ({bench.architecture.name} here)")
    if base.checkpointing != paper.CHECKPOINTING:
        parts.append(f"checkpointing is {base.checkpointing} here")
    return ", ".join([*parts, "the paper's versions are not known"])


def _opposites(study: Study) -> list[str]:
    """Name the changes whose direction here is not that of the paper, all changes taken at once."""
    told = []
    for way in study.ways:
        for method, ratio in way.ratio.items():
            if ratio is not None and _direction(ratio) not in (0, 1 if way.paper_ratio > 1 else -1):
                told.append(
                    f"* Run {way.start.name} to {way.end.name}, {method}: x{ratio.value:.2f} here "
                    f"against x{way.paper_ratio:.2f} in the paper: the direction does not carry "
                    "over."
                )
    return told


def _direction(ratio: Estimate) -> int:
    """Return 1 or -1 where the interval lies on one side of no change, else 0."""
    if ratio.low is not None and ratio.low > 1:
        return 1
    return -1 if ratio.high is not None and ratio.high < 1 else 0
