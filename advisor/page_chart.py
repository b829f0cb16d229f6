"""Charts as SVG: scales, axes and a figure at two widths, for a desk and for a phone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from lora_advisor.advisor.page_html import Child, tag

#: Widths in pixels; the page shows the one that there is room for (page.css).
WIDE, NARROW = 860, 340
#: Pixels that a digit of the axes takes.
_DIGIT = 7


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """From values to pixels.

    Attributes:
        low: Value at `start`.
        high: Value at `end`.
        start: Pixel.
        end: Pixel.
        log: Whether equal ratios take equal room.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        share = (value - low) / (high - low) if high != low else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int) -> list[float]:
        """Return round values, about so many."""
        from matplotlib.ticker import LogLocator, MaxNLocator

        values: Iterable[float] = ()
        if self.log and self.high / self.low > 4:
            values = LogLocator(base=10, subs=(1, 2, 5)).tick_values(self.low, self.high)
        else:
            locator = MaxNLocator(nbins=most, steps=[1, 2, 2.5, 5, 10])
            values = locator.tick_values(self.low, self.high)
        room = 1e-9 * abs(self.high - self.low)
        return [float(v) for v in values if self.low - room <= v <= self.high + room]


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """The plot's rectangle with its scales.

    Attributes:
        width: Of the whole chart, in pixels.
        height: Likewise.
        x: Scale across.
        y: Scale upwards.
    """

    width: int
    height: int
    x: Scale
    y: Scale

    @classmethod
    def of(
        cls,
        width: int,
        height: int,
        x: tuple[float, float],
        y: tuple[float, float],
        *,
        left: int = 56,
        right: int = 16,
        top: int = 14,
        bottom: int = 42,
        log_x: bool = False,
        log_y: bool = False,
    ) -> Frame:
        """Return a frame for values between the ends of `x` and `y`."""
        return cls(
            width=width,
            height=height,
            x=Scale(low=x[0], high=x[1], start=left, end=width - right, log=log_x),
            y=Scale(low=y[0], high=y[1], start=height - bottom, end=top, log=log_y),
        )

    @property
    def is_narrow(self) -> bool:
        """Whether it is the phone's."""
        return self.width <= NARROW


Write = Callable[[float], str]


def across(frame: Frame, label: str, write: Write) -> list[Element]:
    """Return the axis below: lines, numbers and a name."""
    top, bottom = frame.y.end, frame.y.start
    found = []
    for value in frame.x.ticks(4 if frame.is_narrow else 8):
        x = frame.x(value)
        found.append(tag("line", x1=x, x2=x, y1=top, y2=bottom, class_="grid"))
        found.append(text(x, bottom + 17, write(value), anchor="middle"))
    middle = (frame.x.start + frame.x.end) / 2
    found.append(text(middle, bottom + 36, label, anchor="middle", class_="name"))
    return found


def upwards(frame: Frame, label: str, write: Write, *, most: int = 5) -> list[Element]:
    """Return the axis at the left; its name stands above it."""
    left, right = frame.x.start, frame.x.end
    found = []
    for value in frame.y.ticks(most):
        y = frame.y(value)
        found.append(tag("line", x1=left, x2=right, y1=y, y2=y, class_="grid"))
        found.append(text(left - 6, y + 4, write(value), anchor="end"))
    found.append(text(4, frame.y.end - 10, label, class_="name"))
    return found


def text(
    x: float, y: float, words: str, *, anchor: str | None = None, class_: str | None = None
) -> Element:
    """Return a text at its base line."""
    return tag("text", words, x=float(x), y=float(y), text_anchor=anchor, class_=class_)


def path(points: Iterable[tuple[float, float]], class_: str) -> Element:
    """Return a line through pixels."""
    return paths([points], class_)


def paths(lines: Iterable[Iterable[tuple[float, float]]], class_: str) -> Element:
    """Return several lines as one element."""
    drawn = ["M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in line) for line in lines]
    return tag("path", d="".join(drawn).replace(".0", ""), class_=class_, fill="none")


def figure(
    draw: Callable[[int], Element],
    caption: Child | Iterable[Child],
    *,
    entries: Iterable[tuple[str, str]] = (),
) -> Element:
    """Return a chart drawn for both widths, with what it shows beneath.

    Args:
        draw: Draws it for a width.
        caption: What it shows.
        entries: What the marks mean: a class of the page's styles and a name each.
    """
    return tag(
        "figure",
        _legend(entries) if entries else None,
        tag("div", draw(WIDE), class_="wide"),
        tag("div", draw(NARROW), class_="narrow"),
        tag("figcaption", caption),
    )


def _legend(entries: Iterable[tuple[str, str]]) -> Element:
    return tag(
        "ul",
        [tag("li", tag("span", class_=f"key {class_}"), name) for class_, name in entries],
        class_="legend",
    )


def svg(frame: Frame, label: str, *children: Child | Iterable[Child]) -> Element:
    """Return the chart; `label` is read to those who do not see it."""
    return tag(
        "svg",
        *children,
        viewBox=f"0 0 {frame.width} {frame.height}",
        width=frame.width,
        height=frame.height,
        role="img",
        aria_label=label,
    )


def thousands(value: float) -> str:
    """Write a number of tokens for an axis."""
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


def plain_number(value: float) -> str:
    """Write a number for an axis."""
    return f"{value:g}"
