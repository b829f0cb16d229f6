"""The map of what fits as a picture; matplotlib without its global state."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_advisor.advisor.fitmap import FitMap
from lora_advisor.advisor.pictures import write_png
from lora_advisor.probes.machine import GIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Width and height in inches, and dots an inch: 1200 x 825.
SIZE, DPI = (8.0, 5.5), 150
#: Labels an axis has room for.
_LABELS = 14
#: Memory beyond this many times the limit has one colour.
_BEYOND = 2.0


def draw_map(drawn: FitMap, path: Path, *, title: str) -> None:
    """Write the map as a PNG.

    Args:
        drawn: The map.
        path: File to write.
        title: What the picture shows, of which card and limit.

    Raises:
        OutputError: The place cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    paint_map(drawn, figure, axes)
    axes.set_title(title, fontsize=10)
    write_png(figure, path)


def paint_map(drawn: FitMap, figure: Any, axes: Axes) -> None:
    """Draw the map into a part of a figure."""
    _paint(drawn, figure, axes)
    _label(drawn, axes)


def _paint(drawn: FitMap, figure: Any, axes: Axes) -> None:
    """Colour the cells, draw the borders and mark what was asked."""
    import numpy
    from matplotlib.colors import Normalize

    shape = (len(drawn.micro_batches), len(drawn.seq_lens))
    process = numpy.array([cell.process_bytes / GIB for cell in drawn.cells]).reshape(shape)
    verdicts = numpy.array([cell.verdict for cell in drawn.cells]).reshape(shape)
    top = min(float(process.max()), _BEYOND * drawn.limit_bytes / GIB)
    norm = Normalize(min(float(process.min()), top), top)
    mesh = axes.imshow(process, cmap="cividis", norm=norm, origin="lower", aspect="auto")
    extend = "max" if process.max() > top else "neither"
    bar = figure.colorbar(mesh, ax=axes, extend=extend)
    bar.set_label("GiB the process would hold if free to\n(beyond the limit: at least)")
    limit = drawn.limit_bytes / GIB
    if norm.vmin is not None and norm.vmin < limit < top:
        bar.ax.axhline(limit, color="white", linewidth=2)
        bar.ax.axhline(limit, color="black", linewidth=1, linestyle="--")
    _border(axes, verdicts == "fits", "border of what fits")
    rows, columns = numpy.nonzero(verdicts == "uncertain")
    if len(rows):
        axes.plot(columns, rows, marker="$?$", markersize=7, color="white", linestyle="none",
                  label="uncertain: only a run can tell")  # fmt: skip
    _mark(drawn, axes)
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        legend = axes.legend(loc="upper right", fontsize=8, framealpha=1.0)
        legend.get_frame().set_facecolor("#a6a6a6")


def _border(axes: Axes, inside: Any, label: str) -> None:
    """Draw a line along the cells' edges between those inside and those outside."""
    rows, columns = inside.shape
    xs: list[float | None] = []
    ys: list[float | None] = []
    for row in range(rows):
        for column in range(columns):
            if column + 1 < columns and inside[row, column] != inside[row, column + 1]:
                xs += [column + 0.5, column + 0.5, None]
                ys += [row - 0.5, row + 0.5, None]
            if row + 1 < rows and inside[row, column] != inside[row + 1, column]:
                xs += [column - 0.5, column + 0.5, None]
                ys += [row + 0.5, row + 0.5, None]
    if not xs:
        return
    points: tuple[Any, Any] = (xs, ys)
    axes.plot(*points, color="black", linewidth=4.0, solid_capstyle="projecting")
    axes.plot(*points, color="white", linewidth=2.0, label=label)


def _mark(drawn: FitMap, axes: Axes) -> None:
    """Mark the asked size, between the cells where it is none of them."""
    import numpy

    batch, length = drawn.asked.micro_batch, drawn.asked.seq_len
    rows, columns = drawn.micro_batches, drawn.seq_lens
    if not (rows[0] <= batch <= rows[-1] and columns[0] <= length <= columns[-1]):
        return
    x = numpy.interp(length, columns, range(len(columns)))
    y = numpy.interp(batch, rows, range(len(rows)))
    label = f"asked: {batch} x {length}, {drawn.asked.verdict}"
    axes.plot([x], [y], marker="*", markersize=15, color="#ff7f0e", markeredgecolor="black",
              linestyle="none", label=label)  # fmt: skip


def _label(drawn: FitMap, axes: Axes) -> None:
    for values, set_ticks in (
        (drawn.seq_lens, axes.set_xticks),
        (drawn.micro_batches, axes.set_yticks),
    ):
        step = -(-len(values) // (_LABELS if values is drawn.seq_lens else 2 * _LABELS))
        places = list(range(0, len(values), step))
        set_ticks(places, [str(values[place]) for place in places])
    axes.tick_params(axis="x", rotation=45)
    axes.set_xlabel("sequence length (tokens)")
    axes.set_ylabel("micro-batch (sequences)")
