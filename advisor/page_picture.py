"""The key charts of a report as a still picture; matplotlib without its global state."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_advisor.advisor.arms import describe
from lora_advisor.advisor.fitmap import FitMap
from lora_advisor.advisor.map_picture import paint_map
from lora_advisor.advisor.page import config_of, title_of
from lora_advisor.advisor.page_chart import thousands
from lora_advisor.advisor.page_memory import COLOURS, parts_of
from lora_advisor.advisor.page_numbers import BEYOND, front_of, limit_of, plan_facts, points_of
from lora_advisor.advisor.page_run import predicted_of, run_facts, status_text
from lora_advisor.advisor.page_source import Run, Source
from lora_advisor.advisor.page_training import held_out
from lora_advisor.advisor.pictures import write_png
from lora_advisor.advisor.report import gib
from lora_advisor.probes.machine import GIB
from lora_advisor.probes.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Inches across, down for the words above and for each row of charts; dots an inch: 1650 wide.
_WIDTH, _TITLE, _ROW, _DPI = 11.0, 1.1, 4.0, 150
_BLUE, _ORANGE, _RED, _GREY, _PURPLE = "#14647c", "#e8590c", "#b3372b", "#97a1aa", "#8159a5"
_PARTS = {
    "c0": "#97a1aa", "c1": "#2f6f9f", "c2": "#d98032", "c3": "#b3372b", "c4": "#8159a5",
    "c5": "#3f9a6b", "c6": "#c9a227", "c7": "#6bb5c9", "c8": "#a9b3bb", "c9": "#6c7780",
}  # fmt: skip

Draw = Callable[[Any, Any], None]


def draw_report(source: Source, drawn: FitMap | None, path: Path) -> None:
    """Write the picture as a PNG.

    Raises:
        OutputError: The place cannot be written.
    """
    from matplotlib.figure import Figure

    charts = _charts(source, drawn)
    rows = -(-len(charts) // 2)
    figure = Figure(figsize=(_WIDTH, _TITLE + _ROW * rows), dpi=_DPI, layout="constrained")
    grid = figure.add_gridspec(max(rows, 1), 2)
    for number, draw in enumerate(charts):
        wide = number == len(charts) - 1 and len(charts) % 2 == 1
        place = grid[number // 2, :] if wide else grid[number // 2, number % 2]
        draw(figure, figure.add_subplot(place))
    figure.suptitle(_title(source), fontsize=12, x=0.012, ha="left", parse_math=False)
    write_png(figure, path)


def _title(source: Source) -> str:
    """Write the answer in lines that the picture has room for."""
    config = config_of(source)
    lines = [title_of(source)] + ([] if config is None else [describe(config)])
    run, plan = source.run, source.plan
    if run is not None and run.result is None:
        lines.append(status_text(run)[0])
    facts = run_facts(source) if run is not None else [] if plan is None else plan_facts(plan)
    told = [f"{fact.name.lower()} {fact.value} ({fact.known})" for fact in facts[:4]]
    pairs = [", ".join(told[at : at + 2]) for at in range(0, len(told), 2)]
    return "\n".join([*lines, *pairs])


def _charts(source: Source, drawn: FitMap | None) -> list[Draw]:
    found: list[Draw] = []
    run, plan = source.run, source.plan
    if run is not None and run.points:
        found += [lambda _, axes: _loss(run, axes), lambda _, axes: _speed(source, run, axes)]
    if plan is not None:
        if parts_of(plan):
            found.append(lambda _, axes: _memory(plan, axes))
        if points_of(source):
            found.append(lambda _, axes: _tradeoff(source, plan, axes))
        if any(p.expected_tokens_per_s and p.tokens_per_s for p in source.trail):
            found.append(lambda _, axes: _foretold(source, axes))
        if drawn is not None:
            found.append(lambda figure, axes: _map(drawn, plan, figure, axes))
    return found


def _map(drawn: FitMap, plan: Plan, figure: Any, axes: Axes) -> None:
    paint_map(drawn, figure, axes)
    compiled = drawn.config.compile != plan.chosen.config.compile
    told = "traced, without compilation" if compiled else "traced"
    axes.set_title(f"what fits ({told})", fontsize=10)


def _memory(plan: Plan, axes: Axes) -> None:
    """Draw the parts of the process, one above the other, with the limit."""
    parts = parts_of(plan)
    below = 0.0
    for name, size in parts:
        colour = _PARTS[COLOURS.get(name, "c0")]
        axes.bar([0], [size / GIB], bottom=below, width=0.5, color=colour,
                 label=f"{name} {size / GIB:.2f}")  # fmt: skip
        below += size / GIB
    limit = limit_of(plan) / GIB
    axes.axhline(limit, color=_RED, linestyle="--", label=f"limit {limit:.2f}")
    ran = plan.chosen.measured
    if ran is not None and ran.process_bytes is not None:
        axes.plot([0.3], [ran.process_bytes / GIB], marker="<", color="black", linestyle="none",
                  label=f"measured {ran.process_bytes / GIB:.2f}")  # fmt: skip
    axes.set_xlim(-0.3, 1.5)
    axes.set_xticks([])
    axes.set_ylabel("GiB")
    axes.set_title(f"memory at the peak: {plan.chosen.prediction.memory.instant}", fontsize=10)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center right", fontsize=8, frameon=False)


def _tradeoff(source: Source, plan: Plan, axes: Axes) -> None:
    """Draw speed against memory with what no other beats."""
    limit = limit_of(plan) / GIB
    points = [p for p in points_of(source) if p.process_bytes <= BEYOND * limit * GIB]
    looks: list[tuple[str, Any, dict[str, Any]]] = [
        ("does not fit, or uncertain", lambda p: p.kind == "other" and not p.runs,
         {"marker": "x", "color": _GREY}),
        ("predicted", lambda p: p.kind == "other" and p.runs and not p.measured,
         {"marker": "o", "color": _BLUE, "markerfacecolor": "white"}),
        ("measured", lambda p: p.kind == "other" and p.runs and p.measured,
         {"marker": "o", "color": _BLUE}),
        ("baseline", lambda p: p.kind == "baseline", {"marker": "D", "color": _PURPLE}),
        ("the plan", lambda p: p.kind == "chosen",
         {"marker": "*", "color": _ORANGE, "markersize": 14}),
    ]  # fmt: skip
    front = front_of(points, limit_of(plan))
    if len(front) > 1:
        axes.step([p.process_bytes / GIB for p in front], [p.tokens_per_s for p in front],
                  where="post", color=_ORANGE, linewidth=1.2, label="not beaten")  # fmt: skip
    for label, belongs, look in looks:
        mine = [p for p in points if belongs(p)]
        if mine:
            axes.plot([p.process_bytes / GIB for p in mine], [p.tokens_per_s for p in mine],
                      linestyle="none", label=label, **look)  # fmt: skip
    axes.axvline(limit, color=_RED, linestyle="--", label=f"limit {gib(limit * GIB)}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("memory of the process (GiB)")
    axes.set_ylabel("tokens/s")
    axes.set_title("speed against memory", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize=8)


def _foretold(source: Source, axes: Axes) -> None:
    """Draw what was predicted before each probe beside what it measured."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    first = True
    for number, probed in enumerate(source.trail, start=1):
        expected, measured = probed.expected_tokens_per_s, probed.tokens_per_s
        if expected is None or measured is None:
            continue
        axes.plot([expected.low, expected.high], [number, number], color=_BLUE, alpha=0.5)
        axes.plot([expected.value], [number], marker="o", color=_BLUE, markerfacecolor="white",
                  linestyle="none", label="predicted before" if first else None)  # fmt: skip
        axes.plot([measured], [number], marker="o", color=_BLUE, linestyle="none",
                  label="measured" if first else None)  # fmt: skip
        first = False
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: thousands(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.invert_yaxis()
    axes.set_yticks(range(1, len(source.trail) + 1))
    axes.set_ylabel("probe, in order")
    axes.set_xlabel("tokens/s")
    again = ", computed again" if source.recomputed else ""
    axes.set_title(f"predicted before each probe{again}, and measured", fontsize=10)
    axes.grid(alpha=0.3, axis="x")
    axes.legend(loc="best", fontsize=8)


def _loss(run: Run, axes: Axes) -> None:
    points = [(p.step, p.loss) for p in run.points if math.isfinite(p.loss)]
    if points:
        axes.plot(*zip(*points, strict=True), color=_BLUE, label="training")
    held = held_out(run)
    if held:
        axes.plot(*zip(*held, strict=True), marker="o", color=_ORANGE, linestyle="none",
                  label="hold-out")  # fmt: skip
    axes.set_xlabel("optimizer step")
    axes.set_title("loss", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize=8)


def _speed(source: Source, run: Run, axes: Axes) -> None:
    axes.plot([p.step for p in run.points], [p.padded_tokens_per_s for p in run.points],
              color=_BLUE, label="training")  # fmt: skip
    promised = predicted_of(source)
    if promised is not None and promised.padded_tokens_per_s is not None:
        axes.axhline(promised.padded_tokens_per_s, color=_GREY, linestyle="--", label="predicted")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("optimizer step")
    axes.set_title("tokens/s, padding included", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize=8)
