"""The effects of a bench as a picture; matplotlib without its global state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_advisor.advisor.effects import Effect
from lora_advisor.advisor.pictures import write_png
from lora_advisor.advisor.report_effects import effect_name
from lora_advisor.probes.machine import GIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Inches across, and down for what is not a row and for each row; dots an inch.
_WIDTH, _MARGIN, _ROW, _DPI = 10.0, 1.7, 0.36, 150
_COLOURS = {"method": "#1f6f8b", "optimizer": "#c8553d", "precision": "#5b8c3a", "size": "#6b4e9b"}
#: The axes show at least this much each way: a few MiB or per mille are not to look like much.
_LEAST_GIB, _LEAST_RATIO = 0.1, 1.1
#: Figures of memory, best first: what the allocator held, else the process.
_MEMORY = ("reserved_bytes", "process_bytes")


def draw_effects(effects: Sequence[Effect], path: Path, *, title: str) -> None:
    """Write the effects as a PNG: a row a comparison, a panel a figure.

    Args:
        effects: At least one.
        path: File to write.
        title: What was measured, of which card.

    Raises:
        OutputError: The place cannot be written.
    """
    from matplotlib.figure import Figure

    memory = next((n for n in _MEMORY if any(n in e.differences for e in effects)), None)
    energy = any("joules_per_token" in effect.ratios for effect in effects)
    panels = 1 + (memory is not None) + energy
    size = (_WIDTH, _MARGIN + _ROW * len(effects))
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    _ratios(axes[0], effects, "tokens_per_s", "tokens/s, times as many")
    if memory is not None:
        _differences(axes[1], effects, memory)
    if energy:
        _ratios(axes[-1], effects, "joules_per_token", "joules/token, times as much")
    _rows(axes[0], effects)
    figure.suptitle(title, fontsize=10)
    write_png(figure, path)


def _rows(axes: Axes, effects: Sequence[Effect]) -> None:
    """Name the rows, first on top, in the colour of their factor."""
    axes.set_yticks(range(len(effects)), [effect_name(effect) for effect in effects], fontsize=8)
    for label, effect in zip(axes.get_yticklabels(), effects, strict=True):
        label.set_color(_COLOURS.get(effect.factor, "black"))
    axes.set_ylim(len(effects) - 0.4, -0.6)


def _ratios(axes: Axes, effects: Sequence[Effect], name: str, label: str) -> None:
    """Draw ratios on a logarithmic axis: mean with interval, range of the conditions behind it."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.set_xscale("log")
    axes.axvline(1, color="grey", linewidth=1)
    for row, effect in enumerate(effects):
        ratio = effect.ratios.get(name)
        if ratio is None:
            continue
        colour = _COLOURS.get(effect.factor, "black")
        _range(axes, row, ratio.smallest, ratio.largest, colour)
        if ratio.low is not None and ratio.high is not None:
            axes.plot([ratio.low, ratio.high], [row, row], color=colour, linewidth=1.5, marker="|")
        axes.plot([ratio.value], [row], marker="o", markersize=5, color=colour)
    low, high = axes.get_xlim()
    low, high = min(low, 1 / _LEAST_RATIO), max(high, _LEAST_RATIO)
    axes.set_xlim(low, high)
    narrow = high / low < 5  # whole decades and their halves would then be too few
    axes.xaxis.set_major_locator(
        MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]) if narrow else LogLocator(subs=(1.0, 2.0, 5.0))
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label, fontsize=9)
    _grid(axes)


def _differences(axes: Axes, effects: Sequence[Effect], name: str) -> None:
    """Draw differences of memory: mean, and the range of the conditions behind it."""
    from matplotlib.ticker import MaxNLocator

    axes.axvline(0, color="grey", linewidth=1)
    for row, effect in enumerate(effects):
        difference = effect.differences.get(name)
        if difference is None:
            continue
        colour = _COLOURS.get(effect.factor, "black")
        _range(axes, row, difference.smallest / GIB, difference.largest / GIB, colour)
        axes.plot([difference.mean / GIB], [row], marker="o", markersize=5, color=colour)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, -_LEAST_GIB), max(high, _LEAST_GIB))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel(f"{name.removesuffix('_bytes')} memory, GiB more", fontsize=9)
    _grid(axes)


def _range(axes: Axes, row: int, low: float, high: float, colour: str) -> None:
    axes.plot([low, high], [row, row], color=colour, alpha=0.25, linewidth=7,
              solid_capstyle="butt")  # fmt: skip


def _grid(axes: Axes) -> None:
    axes.grid(axis="x", alpha=0.3)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
