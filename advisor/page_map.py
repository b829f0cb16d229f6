"""The map of micro-batch and sequence length as a picture of a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from xml.etree.ElementTree import Element

from lora_advisor.advisor.fitmap import Cell, FitMap
from lora_advisor.advisor.page_chart import Frame, figure, paths, svg, text
from lora_advisor.advisor.page_html import tag
from lora_advisor.advisor.page_words import Table
from lora_advisor.advisor.report import gib
from lora_advisor.probes.plan import Plan

#: Shades of what fits, by the share of the limit that is used.
_SHADES = 5
_CLASSES = {"uncertain": "u", "does not fit": "n"}


def map_section(drawn: FitMap, plan: Plan) -> list[Element]:
    """Return the map with what its colours mean."""
    fits = sum(cell.verdict == "fits" for cell in drawn.cells)
    caption = (
        f"{fits} of {len(drawn.cells)} sizes fit {gib(drawn.limit_bytes)}, all else as planned "
        f"(accumulation {drawn.config.accumulation}); traced with the versions installed where "
        "this report was made, not measured."
    )
    if drawn.config.compile != plan.chosen.config.compile:
        caption += (
            f" The plan compiles; the map is that of the same configuration without: "
            f"{gib(drawn.asked.process_bytes)} at the plan's size, where the plan itself needs "
            f"{held_text(plan)}."
        )
    entries = [("k f0", "fits, little used"), (f"k f{_SHADES - 1}", "fits, nearly full"),
               ("k u", "uncertain: only a run can tell"), ("k n", "does not fit"),
               ("k star", "the plan")]  # fmt: skip
    return [figure(lambda width: _chart(drawn, width), caption, entries=entries)]


def held_text(plan: Plan) -> str:
    """Write what the plan's process holds, and how that is known."""
    ran, memory = plan.chosen.measured, plan.chosen.prediction.memory
    if ran is not None and ran.process_bytes is not None:
        return f"{gib(ran.process_bytes)} (measured)"
    return f"{gib(memory.process_bytes)} ({memory.evidence})"


def _chart(drawn: FitMap, width: int) -> Element:
    rows, columns = drawn.micro_batches, drawn.seq_lens
    narrow = width < 400
    row_height = 17 if narrow else 20
    height = row_height * len(rows) + 66
    frame = Frame.of(width, height, (0, len(columns)), (0, len(rows)), left=34 if narrow else 46,
                     right=8, top=22, bottom=44)  # fmt: skip
    label = f"Which of {len(drawn.cells)} sizes fit {gib(drawn.limit_bytes)}"
    return svg(frame, label, _cells(drawn, frame), _border(drawn, frame), _star(drawn, frame),
               _labels(frame, rows, columns))  # fmt: skip


def _cells(drawn: FitMap, frame: Frame) -> Iterator[Element]:
    for number, cell in enumerate(drawn.cells):
        row, column = divmod(number, len(drawn.seq_lens))
        x, y = frame.x(column), frame.y(row + 1)
        yield tag("rect", x=x, y=y, width=frame.x(column + 1) - x, height=frame.y(row) - y,
                  class_=_class(cell, drawn.limit_bytes), data_tip=tip_of(cell))  # fmt: skip


def _class(cell: Cell, limit: int) -> str:
    if cell.verdict != "fits":
        return f"k {_CLASSES[cell.verdict]}"
    return f"k f{min(_SHADES - 1, int(_SHADES * cell.process_bytes / limit))}"


def tip_of(cell: Cell) -> str:
    """Say what is known of a size."""
    held = ("at least " if cell.at_least else "") + gib(cell.process_bytes)
    return f"{cell.micro_batch} x {cell.seq_len:,}: {cell.verdict}; the process would hold {held}"


def _border(drawn: FitMap, frame: Frame) -> Element:
    """Draw the limit: along the edges between what fits and what does not."""
    columns = len(drawn.seq_lens)
    inside = [cell.verdict == "fits" for cell in drawn.cells]
    lines = []
    for number, here in enumerate(inside):
        row, column = divmod(number, columns)
        if column + 1 < columns and here != inside[number + 1]:
            lines.append([(column + 1, row), (column + 1, row + 1)])
        if row + 1 < len(drawn.micro_batches) and here != inside[number + columns]:
            lines.append([(column, row + 1), (column + 1, row + 1)])
    return paths(([(frame.x(x), frame.y(y)) for x, y in line] for line in lines), "border")


def _star(drawn: FitMap, frame: Frame) -> Element | None:
    """Mark the plan's size."""
    asked = drawn.asked
    if asked.micro_batch not in drawn.micro_batches or asked.seq_len not in drawn.seq_lens:
        return None
    x = frame.x(drawn.seq_lens.index(asked.seq_len) + 0.5)
    y = frame.y(drawn.micro_batches.index(asked.micro_batch) + 0.5)
    return star(x, y, 8.0, f"the plan, {tip_of(asked)}")


def star(x: float, y: float, size: float, tip: str) -> Element:
    """Return a star of five points."""
    from math import cos, pi, sin

    corners = []
    for number in range(10):
        radius = size if number % 2 == 0 else size * 0.45
        angle = pi * number / 5
        corners.append(f"{x + radius * sin(angle):.1f},{y - radius * cos(angle):.1f}")
    return tag("polygon", points=" ".join(corners), class_="mark star", data_tip=tip)


def _labels(frame: Frame, rows: Sequence[int], columns: Sequence[int]) -> Iterator[Element]:
    step = -(-len(columns) // (6 if frame.is_narrow else 14))
    for number in range(0, len(columns), step):
        yield text(frame.x(number + 0.5), frame.y.start + 16, f"{columns[number]:,}",
                   anchor="middle")  # fmt: skip
    for number, batch in enumerate(rows):
        yield text(frame.x.start - 5, frame.y(number + 0.5) + 4, f"{batch}", anchor="end")
    middle = (frame.x.start + frame.x.end) / 2
    yield text(middle, frame.y.start + 35, "sequence length (tokens)", anchor="middle",
               class_="name")  # fmt: skip
    yield text(4, 12, "micro-batch (sequences)", class_="name")


def largest_table(drawn: FitMap) -> Table:
    """Return the largest micro-batch on the map that fits, for each length."""
    rows = []
    for length in drawn.seq_lens:
        fits = [b for b in drawn.micro_batches if drawn.at(b, length).verdict == "fits"]
        rows.append((f"{length:,}", f"{max(fits):,}" if fits else "none"))
    headers = ("sequence length", "largest micro-batch that fits")
    return Table(headers=headers, rows=tuple(rows), numbers=(0, 1))
