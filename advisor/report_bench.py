"""A bench as a report for people: what each factor does, the model, every configuration."""

from __future__ import annotations

import shlex
import statistics
from collections import Counter
from collections.abc import Sequence

from lora_advisor.advisor.bench import Bench, Run
from lora_advisor.advisor.bench_design import FACTORS, OPTIONS, Cell
from lora_advisor.advisor.bench_study import Study
from lora_advisor.advisor.report import gib
from lora_advisor.advisor.report_effects import (
    READING,
    effects_table,
    order_text,
    ratio_text,
    table,
)
from lora_advisor.advisor.report_paper import paper_section
from lora_advisor.probes.config import LoraShape, RunConfig
from lora_advisor.probes.machine import GIB

#: Knobs of RunConfig that all cells share, in the order they are written.
FIXED = ("trainer", "checkpointing", "attention", "kernels", "loss", "compile", "allocator",
         "accumulation")  # fmt: skip
_TERMS = """\
A factor: its fastest level against its slowest. Two factors: how far a combination lies at most \
off the product of its two levels. p: how often chance alone would show as much."""
#: Others, written only where they are not as is usual.
_USUAL = {
    "stage": "sft",
    "adapter": "peft",
    "embedding": "device",
    "cuda_graph": "off",
    "recompute": "layer",
}


def fixed_of(base: RunConfig) -> tuple[str, ...]:
    """Return the knobs of RunConfig that all cells share and that are worth a word."""
    return FIXED + tuple(name for name, usual in _USUAL.items() if getattr(base, name) != usual)


def _model_section(study: Study) -> list[str]:
    """Write how far each factor and each two of them move the speed, by the model of all."""
    model = study.model
    if model is None:
        return []
    rows = [
        [
            " x ".join(term.factors),
            f"x{term.span:.2f}",
            "-" if term.p_value is None else _p_text(term.p_value),
        ]
        for term in sorted(model.terms, key=lambda term: (len(term.factors), -term.span))
    ]
    lines = ["## All factors at once", ""]
    lines += [table(["term", "tokens/s", "p"], rows, markdown=True), "", _TERMS, ""]
    lines.append(
        f"Residual of the model: {_percent(model.residual)} ({model.freedom} degrees of freedom); "
        f"between runs of one configuration: {_percent(study.spread)}."
    )
    if model.left_out:
        left_out = "; ".join(f"{what} ({why})" for what, why in model.left_out)
        lines.append(f"Left out: {left_out}.")
    return [*lines, ""]


def _dependences(study: Study) -> list[str]:
    if not study.dependences:
        return []
    rows = [
        [f"{d.level} against {d.against}", f"{d.given_factor} {d.given}", ratio_text(d.ratio)]
        for d in study.dependences
    ]
    text = table(["everything else equal", "with", "tokens/s"], rows, markdown=True, left=2)
    return ["## Where an effect depends on another factor", "", text, ""]


def _p_text(p_value: float) -> str:
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def _percent(deviation: float | None) -> str:
    return "unknown" if deviation is None else f"{100 * deviation:.1f} %"


def _cells_table(bench: Bench) -> str:
    energy = any(run.result.joules_per_token for run in bench.measured)
    headers = [*FACTORS, "runs", "tokens/s", "s per 10k tokens"]
    headers += ["allocated GiB", "reserved GiB", "process GiB"] + ["joules/token"] * energy
    rows = []
    for cell in bench.design.cells:
        runs = [run for run in bench.runs_of(cell) if run.repeat is not None]
        row = [*cell.levels, str(len(runs)), *_speeds(bench, cell, runs)]
        for name in ("allocated_bytes", "reserved_bytes", "process_bytes"):
            row.append(_median_text(runs, name, GIB, ".2f"))
        if energy:
            row.append(_median_text(runs, "joules_per_token", 1, ".4f"))
        rows.append(row)
    return table(headers, rows, markdown=True, left=len(FACTORS))


def _speeds(bench: Bench, cell: Cell, runs: Sequence[Run]) -> list[str]:
    speeds = [run.result.tokens_per_s for run in runs if run.result.tokens_per_s]
    if not speeds:
        return [bench.state_of(cell), "-"]
    middle = statistics.median(speeds)
    text = f"{middle:,.0f}"
    if len(speeds) > 1:
        text += f" ({min(speeds):,.0f} to {max(speeds):,.0f})"
    return [text, f"{1e4 / middle:.2f}"]


def _median_text(runs: Sequence[Run], name: str, unit: float, form: str) -> str:
    known = [value for run in runs if (value := getattr(run.result, name)) is not None]
    return f"{statistics.median(known) / unit:{form}}" if known else "-"


def _not_run_section(bench: Bench, *, markdown: bool = True) -> list[str]:
    rows = []
    for cell in bench.design.cells:
        ended = [run for run in bench.runs_of(cell) if run.repeat is None]
        if cell.config is None:
            rows.append([", ".join(cell.levels), "not possible", cell.reason or ""])
        elif ended:
            last = ended[-1]
            detail = (last.result.detail or "").replace("|", "/")
            rows.append([", ".join(cell.levels), last.ending.replace("_", " "), detail[:200]])
    if not rows:
        return []
    text = table(["configuration", "ending", "why"], rows, markdown=markdown, left=3)
    return ["", "## What did not run", "", text, ""]


def headline(bench: Bench) -> str:
    """Write what was measured where, in one line."""
    cells = len(bench.design.cells)
    text = f"{bench.architecture.name} on {bench.machine.name}: {len(bench.measured)} runs of "
    text += f"{cells} configurations, {bench.design.repeats} wanted of each"
    endings = Counter(run.ending for run in bench.runs if run.repeat is None)
    for ending, count in endings.items():
        text += f", {count} {ending.replace('_', ' ')}"
    impossible = sum(cell.config is None for cell in bench.design.cells)
    text += f", {impossible} not possible" if impossible else ""
    return text + (f"; {bench.missing} runs are missing" if bench.missing else "")


def report_text(study: Study, *, picture: str | None) -> str:
    """Write the report as Markdown.

    Args:
        study: What came out.
        picture: Name of the picture beside the report; None where there is none.
    """
    bench = study.bench
    lines = [f"# LoRA and QLoRA on {bench.machine.name}", "", headline(bench) + ".", ""]
    lines += [_setting(bench), ""]
    if study.effects:
        lines += ["## What each factor does", "", effects_table(study, markdown=True), ""]
        lines += [order_text(study.effects), "", READING, ""]
    if picture is not None:
        lines += [f"![Effects of each factor]({picture})", ""]
    lines += [*_dependences(study), *_model_section(study)]
    lines += paper_section(study)
    lines += ["## Every configuration", "", _cells_table(bench), ""]
    lines.append("Medians of the repeats, for speed with the lowest and the highest.")
    lines += [*_not_run_section(bench), ""]
    lines += ["## Run it on your card", "", f"    {command(bench)}", ""]
    return "\n".join(lines)


def answer_text(study: Study) -> str:
    """Write the short answer for a terminal: what each factor does."""
    bench = study.bench
    lines = [headline(bench)]
    if study.effects:
        lines += ["", effects_table(study, markdown=False), "", order_text(study.effects)]
        lines += ["", READING]
    lines += [line.replace("## ", "") for line in _not_run_section(bench, markdown=False)]
    return "\n".join(lines).rstrip()


def _setting(bench: Bench) -> str:
    dates = sorted({(run.result.started_at or "")[:10] for run in bench.runs})
    what = "the process" if bench.device == "cpu" else "what PyTorch allocates"
    weights = "random" if bench.architecture.weights is None else "stored"
    stack = ", ".join(f"{k} {v}" for k, v in bench.stack.packages().items() if v is not None)
    rows = {
        "date": " to ".join(dates[:: max(1, len(dates) - 1)]) or "-",
        "card": _card(bench),
        "stack": stack,
        "held fixed": _fixed(bench),
        "limit": f"{gib(bench.cap_bytes)} for {what}",
        "order": f"random in each repeat, seed {bench.design.seed}",
        "a run": f"a process of its own, {weights} weights, full rows of random tokens; warm-up "
        "steps left out, tokens/s at the median step",
        "energy": _energy(bench),
        "doubts": _doubts(bench),
    }
    return "\n".join(f"* {name}: {text}" for name, text in rows.items())


def _energy(bench: Bench) -> str:
    sources = {run.result.energy_source for run in bench.measured} - {None}
    if sources == {"board power"}:
        return "not measured: the card only tells its power limit"
    known = sum(run.result.joules_per_token is not None for run in bench.measured)
    if not known:
        return "not measured"
    return f"{' and '.join(sorted(map(str, sources)))}, in {known} of {len(bench.measured)} runs"


def _doubts(bench: Bench) -> str:
    """Write what makes times doubtful; these runs count, for the repeats show how much it is."""
    counts = Counter(doubt for run in bench.measured for doubt in run.result.doubts)
    of = len(bench.measured)
    return "; ".join(f"{doubt} in {n} of {of} runs" for doubt, n in counts.items()) or "none"


def _card(bench: Bench) -> str:
    machine = bench.machine
    parts = [machine.name, gib(machine.memory_bytes)]
    parts += [f"driver {machine.driver}"] if machine.driver else []
    parts += [f"host {machine.host}"] if machine.host and machine.kind != "cpu" else []
    return ", ".join(parts)


def _fixed(bench: Bench) -> str:
    base = bench.design.base
    parts = [f"{name} {getattr(base, name)}" for name in fixed_of(base)]
    if base.lora is None:
        return ", ".join(parts)
    lora, targets = base.lora, _targets(base.lora)
    parts.append(f"adapter r {lora.r}, alpha {lora.alpha:g}, dropout {lora.dropout:g}, {targets}")
    return ", ".join(parts)


def command(bench: Bench) -> str:
    """Return the command line that runs the same bench elsewhere."""
    words = ["lora-advisor", "bench", "--model", bench.architecture.name]
    for factor, levels in bench.design.factors.items():
        words += [OPTIONS[factor], ",".join(levels)]
    words += ["--repeats", str(bench.design.repeats), "--seed", str(bench.design.seed)]
    base = bench.design.base
    for name in (name for name in fixed_of(base) if name != "loss"):
        words += [f"--{name.replace('_', '-')}", str(getattr(base, name))]
    if base.lora is not None:
        words += ["--rank", str(base.lora.r), "--alpha", f"{base.lora.alpha:g}"]
        words += ["--dropout", f"{base.lora.dropout:g}", "--targets", _targets(base.lora, ",")]
    if bench.vram_bytes is not None:
        words += ["--vram", f"{bench.vram_bytes / GIB:g}"]
    return shlex.join(words)


def _targets(lora: LoraShape, between: str = "+") -> str:
    return lora.targets if isinstance(lora.targets, str) else between.join(lora.targets)
