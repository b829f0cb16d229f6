"""Speed as pictures of a page: against memory, and what was predicted beside what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from xml.etree.ElementTree import Element

from lora_advisor.advisor.arms import describe
from lora_advisor.advisor.page_chart import (
    Frame,
    across,
    figure,
    path,
    plain_number,
    svg,
    text,
    thousands,
    upwards,
)
from lora_advisor.advisor.page_html import tag
from lora_advisor.advisor.page_map import star
from lora_advisor.advisor.page_memory import limit_line
from lora_advisor.advisor.page_numbers import (
    BEYOND,
    Point,
    front_of,
    limit_of,
    points_of,
    range_text,
)
from lora_advisor.advisor.page_source import Source
from lora_advisor.advisor.report import gib
from lora_advisor.probes.machine import GIB
from lora_advisor.probes.plan import Plan
from lora_advisor.probes.trail import Probed


def tradeoff_section(source: Source) -> list[Element]:
    """Return the picture of speed against memory; nothing where no speed is known."""
    plan, points = source.plan, points_of(source)
    if plan is None or not points:
        return [tag("p", "No speed is known.", class_="missing")]
    limit = limit_of(plan)
    shown = [p for p in points if p.process_bytes <= BEYOND * limit]
    left = len(points) - len(shown)
    caption = (
        "Each mark is a configuration. The line joins those that no other beats in both speed and "
        "memory, of what fits."
    )
    if left:
        caption += f" Not drawn: {left} that need more than {gib(BEYOND * limit)}."
    entries = [("m star", "the plan"), ("m base", "the baseline"), ("m ran", "measured"),
               ("m pred", "predicted"), ("m no", "does not fit, or uncertain"),
               ("m front-line", "not beaten")]  # fmt: skip
    return [figure(lambda width: _tradeoff(plan, shown, width), caption, entries=entries)]


def _tradeoff(plan: Plan, points: Sequence[Point], width: int) -> Element:
    limit = limit_of(plan) / GIB
    most = max([limit, *(p.process_bytes / GIB for p in points)]) * 1.05
    fastest = max(max(p.tokens_per_s, p.high or 0) for p in points if _is_named(p))
    fastest = max(fastest, *(p.tokens_per_s for p in points)) * 1.08
    least = min(limit, *(p.process_bytes / GIB for p in points))
    low = 0.0 if least < most / 3 else least * 0.9
    frame = Frame.of(width, 300 if width < 400 else 380, (low, most), (0, fastest),
                     left=46, top=34)  # fmt: skip
    front = front_of(points, limit_of(plan))
    order = sorted(points, key=lambda p: (_is_named(p), p.measured))
    return svg(
        frame,
        f"Speed against memory of {len(points)} configurations",
        across(frame, "memory of the process (GiB)", plain_number),
        upwards(frame, "tokens/s", thousands),
        limit_line(frame, limit, f"limit {limit:.2f}"),
        path(_steps(front, frame), "front") if len(front) > 1 else None,
        [_mark(point, frame) for point in order],
    )


def _is_named(point: Point) -> bool:
    return point.kind != "other"


def _steps(front: Sequence[Point], frame: Frame) -> Iterator[tuple[float, float]]:
    """Yield the corners of the border: more speed only for more memory."""
    height = None
    for point in front:
        x, y = frame.x(point.process_bytes / GIB), frame.y(point.tokens_per_s)
        if height is not None:
            yield x, height
        yield x, y
        height = y


def _mark(point: Point, frame: Frame) -> Element:
    x, y = frame.x(point.process_bytes / GIB), frame.y(point.tokens_per_s)
    known = "measured" if point.measured else "predicted"
    tip = f"{point.what}\n{point.tokens_per_s:,.0f} tokens/s {known}"
    if point.low is not None and point.high is not None:
        tip += f" ({point.low:,.0f} to {point.high:,.0f})"
    tip += f", {gib(point.process_bytes)}\n{point.verdict}"
    if point.kind == "chosen":
        return star(x, y, 10.0, "the plan: " + tip)
    if point.kind == "baseline":
        return tag("rect", x=x - 5.5, y=y - 5.5, width=11, height=11, class_="mark base",
                   transform=f"rotate(45 {x:.1f} {y:.1f})",
                   data_tip="baseline: " + tip)  # fmt: skip
    if not point.runs:
        cross = f"M{x - 4:.1f} {y - 4:.1f}l8 8m0-8l-8 8"
        return tag("path", d=cross, class_="mark no", data_tip=tip)
    return tag("circle", cx=x, cy=y, r=5 if point.measured else 4,
               class_="mark ran" if point.measured else "mark pred", data_tip=tip)  # fmt: skip


def foretold_section(source: Source) -> list[Element]:
    """Return what was predicted before each probe beside what it measured."""
    both = [
        (number, p) for number, p in enumerate(source.trail, start=1)
        if p.expected_tokens_per_s is not None and p.tokens_per_s is not None
    ]  # fmt: skip
    memory = [
        p for p in source.trail
        if p.expected_process_bytes is not None and p.process_bytes is not None
        and p.outcome == "ok"
    ]  # fmt: skip
    if not both and not memory:
        words = (
            "This plan does not hold what was predicted before each probe; --record with its "
            "record of probes lets it be computed again."
            if source.trail
            else "No probe was run: every figure is a prediction."
        )
        return [tag("p", words, class_="missing")]
    caption = (
        "What the models said before each probe, with the range they gave, beside what it then "
        "measured. Before the first probe a prediction rests on the published figures of the card, "
        "where there are any; each probe teaches the next."
    )
    if source.recomputed:
        caption += (
            " The predictions were computed again for this report, by this program and its traces, "
            "from what was known before each probe."
        )
    entries = [("m ran", "measured"), ("m pred", "predicted before, with its range")]
    found = []
    if both:
        found.append(figure(lambda width: _foretold(both, width), caption, entries=entries))
    if memory:
        found.append(tag("p", _memory_words(memory)))
    return found


def _memory_words(probes: Sequence[Probed]) -> str:
    errors = [
        100 * (p.expected_process_bytes / p.process_bytes - 1)
        for p in probes
        if p.expected_process_bytes is not None and p.process_bytes
    ]
    worst = max(errors, key=abs)
    return (
        f"Memory of the process: of {len(errors)} probes that ran, the prediction before was off "
        f"by at most {worst:+.2f} %."
    )


def _foretold(numbered: Sequence[tuple[int, Probed]], width: int) -> Element:
    probes = [probed for _, probed in numbered]
    low = min(min(p.expected_tokens_per_s.low, p.tokens_per_s) for p in probes
              if p.expected_tokens_per_s and p.tokens_per_s)  # fmt: skip
    high = max(max(p.expected_tokens_per_s.high, p.tokens_per_s) for p in probes
               if p.expected_tokens_per_s and p.tokens_per_s)  # fmt: skip
    step = 46 if width < 400 else 44
    frame = Frame.of(width, step * len(probes) + 54, (low * 0.85, high * 1.15), (0, 1), left=12,
                     right=14, top=6, bottom=44, log_x=True)  # fmt: skip
    rows: list[Element] = []
    for place, (number, probed) in enumerate(numbered):
        rows += _foretold_row(probed, number, frame, 8.0 + step * place)
    label = "Predicted and measured tokens/s of each probe"
    return svg(frame, label, across(frame, "tokens/s (equal ratios take equal room)", thousands),
               rows)  # fmt: skip


def _foretold_row(probed: Probed, number: int, frame: Frame, top: float) -> list[Element]:
    expected, measured = probed.expected_tokens_per_s, probed.tokens_per_s
    assert expected is not None and measured is not None
    y = top + 27
    what = describe(probed.config)
    room = int((frame.x.end - frame.x.start) / 6.6)
    words = f"{number}  " + (f"{probed.why}: " if probed.why else "") + what
    off = 100 * (expected.value / measured - 1)
    tip = (
        f"{what}\npredicted {expected.value:,.0f} ({range_text(expected)}), "
        f"{expected_known(probed)}\nmeasured {measured:,.0f} tokens/s: {off:+.0f} %"
    )
    low, middle, high = (frame.x(v) for v in (expected.low, expected.value, expected.high))
    return [
        text(frame.x.start, top + 12, words if len(words) <= room else words[: room - 1] + "…"),
        path([(low, y), (high, y)], "range"),
        tag("circle", cx=middle, cy=y, r=5, class_="mark pred", data_tip=tip),
        tag("circle", cx=frame.x(measured), cy=y, r=5, class_="mark ran", data_tip=tip),
    ]


def expected_known(probed: Probed) -> str:
    """Say what a prediction before a probe rested on."""
    return "traced" if probed.expected_evidence == "traced" else "from the probes before it"
