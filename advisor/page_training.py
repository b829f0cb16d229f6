"""A training as pictures of a page: loss, speed and memory by step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from xml.etree.ElementTree import Element

from lora_advisor.advisor.outcome import Predicted, Progress
from lora_advisor.advisor.page_chart import (
    Frame,
    Write,
    across,
    figure,
    path,
    plain_number,
    svg,
    thousands,
    upwards,
)
from lora_advisor.advisor.page_html import tag
from lora_advisor.advisor.page_source import Run
from lora_advisor.advisor.report import duration, gib
from lora_advisor.probes.machine import GIB

#: Points of a curve; more are thinned out, for a picture has no room for them.
_POINTS = 400

Curve = list[tuple[float, float]]


def curves_section(run: Run, predicted: Predicted | None) -> list[Element]:
    """Return the curves of a training, as far as it has come."""
    if not run.points:
        return [tag("p", "Nothing was reported yet.", class_="missing")]
    points = thinned(run.points)
    held = held_out(run)
    entries = [("m line", "training"), ("m held", "hold-out"), ("m promised", "predicted")]
    speed = None if predicted is None else predicted.padded_tokens_per_s
    memory = None if predicted is None or predicted.peak_bytes is None else (
        predicted.peak_bytes / GIB
    )  # fmt: skip
    peaks = [(float(p.step), p.peak_bytes / GIB) for p in points if p.peak_bytes is not None]
    losses = [(float(p.step), p.loss) for p in points if math.isfinite(p.loss)]
    speeds = [(float(p.step), p.padded_tokens_per_s) for p in points]
    found = [
        _curve(points, losses, "loss (nats a token)", "Loss", marks=held, write=plain_number,
               entries=entries),
        _curve(points, speeds, "tokens/s", "Tokens/s, padding included", level=speed,
               write=thousands),
    ]  # fmt: skip
    if peaks:
        found.append(_curve(points, peaks, "GiB", "Peak memory of the process so far",
                            level=memory, write=plain_number))  # fmt: skip
    return found


def thinned(points: Sequence[Progress]) -> list[Progress]:
    """Return at most so many points as a picture has room for, the last among them."""
    step = -(-len(points) // _POINTS)
    return [*points[:-1:step], points[-1]]


def held_out(run: Run) -> Curve:
    """Return the hold-out's losses by step."""
    found = [] if run.eval_loss_before is None else [(0.0, run.eval_loss_before)]
    if run.result is not None:
        found += [(float(held.step), held.loss) for held in run.result.evaluations]
        after = run.result.eval_loss_after
        if after is not None and all(step != run.result.steps for step, _ in found):
            found.append((float(run.result.steps), after))
    return found


def _curve(
    points: Sequence[Progress],
    line: Curve,
    label: str,
    caption: str,
    *,
    write: Write,
    marks: Curve = [],  # noqa: B006 # only read
    level: float | None = None,
    entries: Sequence[tuple[str, str]] = (),
) -> Element:
    values = [y for _, y in [*line, *marks]] + ([] if level is None else [level])
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    low = 0.0 if low < 0.6 * high else low - 0.15 * (high - low) - 1e-3 * high
    high += 0.08 * (high - low)

    def draw(width: int) -> Element:
        frame = Frame.of(width, 190, (0, max(points[-1].steps, 1)), (low, high), left=50, top=26)
        return svg(
            frame,
            f"{caption} by step",
            across(frame, "optimizer step", plain_number),
            upwards(frame, label, write, most=4),
            None if level is None else path(
                [(frame.x.start, frame.y(level)), (frame.x.end, frame.y(level))], "promised"),
            path([(frame.x(x), frame.y(y)) for x, y in line], "curve") if len(line) > 1 else None,
            _hits(points, frame),
            [tag("circle", cx=frame.x(x), cy=frame.y(y), r=5, class_="mark held",
                 data_tip=f"hold-out after step {x:g}: {y:.3f} nats a token") for x, y in marks],
        )  # fmt: skip

    words = caption if level is None else f"{caption}; predicted {with_unit(level, label)}"
    return figure(draw, words + ".", entries=entries)


def with_unit(value: float, unit: str) -> str:
    """Return a number as people write it: whole from a hundred on, else to two places."""
    return f"{value:,.0f} {unit}" if abs(value) >= 100 else f"{value:.2f} {unit}"


def _hits(points: Sequence[Progress], frame: Frame) -> list[Element]:
    """Return columns that tell what was reported where the pointer stands."""
    steps = [p.step for p in points]
    edges = [frame.x.start]
    edges += [frame.x((a + b) / 2) for a, b in itertools.pairwise(steps)]
    edges.append(frame.x(steps[-1]))
    found = []
    for point, left, right in zip(points, edges, edges[1:], strict=False):
        found.append(
            tag("rect", x=left, y=frame.y.end, width=max(right - left, 1.0),
                height=frame.y.start - frame.y.end, class_="hit", data_tip=_tip(point))
        )  # fmt: skip
    return found


def _tip(point: Progress) -> str:
    told = [
        f"step {point.step} of {point.steps}",
        f"loss {point.loss:.3f}",
        f"{point.padded_tokens_per_s:,.0f} tokens/s, {point.tokens_per_s:,.0f} without padding",
    ]
    if point.peak_bytes is not None:
        told.append(f"peak {gib(point.peak_bytes)}")
    if point.power_w is not None:
        told.append(f"{point.power_w:.0f} W")
    return "\n".join([*told, f"{duration(point.seconds_left)} left"])
