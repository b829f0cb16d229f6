"""Memory as pictures of a page: what the process is made of at its peak, and each stage's peak."""

from __future__ import annotations

from xml.etree.ElementTree import Element

from lora_advisor.advisor.page_chart import Frame, figure, path, plain_number, svg, text
from lora_advisor.advisor.page_html import Child, table, tag
from lora_advisor.advisor.page_numbers import limit_of
from lora_advisor.advisor.report import gib
from lora_advisor.advisor.report_fit import memory_parts
from lora_advisor.probes.machine import GIB
from lora_advisor.probes.plan import Plan

#: Parts in the order of the bar, with the class of their colour (page.css).
COLOURS = {
    "weights": "c1", "adapter": "c2", "gradients": "c3", "optimizer": "c4",
    "stored activations": "c5", "working set": "c6", "workspace": "c7",
    "cache and fragmentation": "c8", "CUDA context": "c9", "Python and its libraries": "c9",
}  # fmt: skip
#: Stages of a training step in their order, and what they are called.
STAGES = {
    "load": "loading", "forward": "forward", "loss": "loss", "backward": "backward",
    "optimizer": "optimizer",
}  # fmt: skip
#: Smaller parts are of no interest.
_LEAST_BYTES = 2**20


def parts_of(plan: Plan) -> list[tuple[str, int]]:
    """Return the parts of the process at its peak in the order of the bar."""
    memory = plan.chosen.prediction.memory
    if not memory.components:
        return []
    context = "Python and its libraries" if plan.machine.kind == "cpu" else "CUDA context"
    order = list(COLOURS)
    found = [p for p in memory_parts(memory, context=context) if p[1] >= _LEAST_BYTES]
    return sorted(found, key=lambda p: order.index(p[0]) if p[0] in order else len(order))


def memory_section(plan: Plan) -> list[Element]:
    """Return the pictures of memory with their numbers."""
    parts, memory = parts_of(plan), plan.chosen.prediction.memory
    if not parts:
        words = "What the peak is made of is unknown: this step was run, not traced."
        return [tag("p", words, class_="missing")]
    ran = plan.chosen.measured
    measured = ""
    if ran is not None and ran.process_bytes is not None:
        measured = f" Measured: {gib(ran.process_bytes)}."
    elif ran is None:
        measured = " It was not measured."
    caption = (
        f"What the process holds at its peak, in the {memory.instant}: "
        f"{gib(memory.process_bytes)} by the models, at most {gib(memory.process_upper_bytes)}."
        + measured
    )
    rows: list[list[Child]] = [
        [
            tag("span", tag("span", class_=f"key {COLOURS.get(name, 'c0')}"), name),
            f"{size / GIB:.2f}",
            f"{100 * size / memory.process_bytes:.1f} %",
        ]
        for name, size in parts
    ]
    stages = [
        "Peak of live tensors in each stage of a step. The allocator holds more than is live."
    ]
    return [
        figure(lambda width: _parts_chart(plan, parts, width), caption),
        table(["part of the process", "GiB", "share"], rows, numbers=(1, 2), class_="slim"),
        *([figure(lambda width: _stages_chart(plan, width), stages)] if memory.phases else []),
    ]


def _parts_chart(plan: Plan, parts: list[tuple[str, int]], width: int) -> Element:
    """Draw the parts as one bar, with the limit, the bound and what was measured."""
    memory, ran = plan.chosen.prediction.memory, plan.chosen.measured
    limit = limit_of(plan)
    most = max(limit, memory.process_upper_bytes, memory.process_bytes) / GIB * 1.04
    frame = Frame.of(width, 128, (0, most), (0, 1), left=12, right=12, top=40, bottom=44)
    top, bottom = frame.y.end, frame.y.start
    shown: list[Element] = []
    start = 0.0
    for name, size in parts:
        x, end = frame.x(start), frame.x(start + size / GIB)
        tip = f"{name}: {gib(size)}, {100 * size / memory.process_bytes:.1f} %"
        shown.append(
            tag("rect", x=x, y=top, width=max(end - x, 0.5), height=bottom - top,
                class_=f"bar {COLOURS.get(name, 'c0')}", data_tip=tip)
        )  # fmt: skip
        start += size / GIB
    y = (top + bottom) / 2
    upper = frame.x(memory.process_upper_bytes / GIB)
    shown.append(path([(frame.x(start), y), (upper, y)], "whisker"))
    shown.append(path([(upper, y - 6), (upper, y + 6)], "whisker"))
    if ran is not None and ran.process_bytes is not None:
        x = frame.x(ran.process_bytes / GIB)
        tip = f"measured: {gib(ran.process_bytes)}"
        shown.append(tag("path", d=f"M{x:.1f} {bottom:.1f}l-6 9h12z", class_="mark measured",
                         data_tip=tip))  # fmt: skip
    return svg(
        frame,
        f"Memory by part; the process holds {gib(memory.process_bytes)} of {gib(limit)}",
        _axis(frame),
        shown,
        limit_line(frame, limit / GIB, f"limit {gib(limit)}"),
    )


def _axis(frame: Frame) -> list[Element]:
    """Return numbers below, without lines through the bar."""
    y = frame.y.start + 24
    ticks = frame.x.ticks(4 if frame.is_narrow else 9)
    found = [text(frame.x(v), y, plain_number(v), anchor="middle") for v in ticks]
    return [*found, text(frame.width / 2, y + 16, "GiB", anchor="middle", class_="name")]


def limit_line(frame: Frame, value: float, words: str) -> list[Element]:
    """Return a dashed line upwards at a limit, its name above at the side that has room."""
    x, top = frame.x(value), frame.y.end
    right = x > (frame.x.start + frame.x.end) / 2
    return [
        path([(x, top - 8), (x, frame.y.start + 4)], "limit"),
        text(x + (4 if right else -4), top - 13, words,
             anchor="end" if right else "start", class_="limit-name"),
    ]  # fmt: skip


def _stages_chart(plan: Plan, width: int) -> Element:
    """Draw a bar for each stage."""
    memory = plan.chosen.prediction.memory
    stages = [(name, memory.phases[key]) for key, name in STAGES.items() if key in memory.phases]
    limit = plan.cap_bytes
    most = max(max(size for _, size in stages), limit or 0) / GIB * 1.04
    height = 62 + 26 * len(stages)
    frame = Frame.of(width, height, (0, most), (0, len(stages)), left=76, right=46, top=26,
                     bottom=36)  # fmt: skip
    peak = max(size for _, size in stages)
    shown = []
    for number, (name, size) in enumerate(stages):
        y = frame.y.end + 26 * number + 3
        end = frame.x(size / GIB)
        shown.append(
            tag("rect", x=frame.x.start, y=y, width=end - frame.x.start, height=20.0,
                class_="bar c5" if size == peak else "bar c8",
                data_tip=f"{name}: {gib(size)} live" + (", the peak" if size == peak else ""))
        )  # fmt: skip
        shown.append(text(frame.x.start - 6, y + 15, name, anchor="end"))
        inside = limit is not None and end < frame.x(limit / GIB) < end + 44
        shown.append(
            text(
                end - 5 if inside else end + 5,
                y + 15,
                f"{size / GIB:.2f}",
                anchor="end" if inside else None,
                class_="inside" if inside else None,
            )
        )
    label = "Peak of live tensors by stage: " + ", ".join(f"{n} {gib(s)}" for n, s in stages)
    whose = "process" if plan.machine.kind == "cpu" else "allocator"
    line = [] if limit is None else limit_line(frame, limit / GIB, f"{whose}'s cap {gib(limit)}")
    return svg(frame, label, shown, line, _below(frame))


def _below(frame: Frame) -> list[Element]:
    y = frame.y.start + 15
    ticks = frame.x.ticks(4 if frame.is_narrow else 9)
    found = [text(frame.x(v), y, plain_number(v), anchor="middle") for v in ticks]
    middle = (frame.x.start + frame.x.end) / 2
    return [*found, text(middle, y + 16, "GiB", anchor="middle", class_="name")]
