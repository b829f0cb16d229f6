"""Elements of a page. The standard library's serialiser escapes; no markup is written by hand."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from importlib.resources import files
from xml.etree.ElementTree import Element, tostring

from lora_advisor.advisor.markdown import printable

Child = Element | str | None


def tag(name: str, *children: Child | Iterable[Child], **attributes: object) -> Element:
    """Return an element; text and attributes of others stay text.

    Args:
        name: Name of the element.
        children: Elements and text, or sequences of them; None is left out.
        attributes: `class_` is class, `data_tip` is data-tip; None is left out, and floats are
            written with at most one decimal, which is a tenth of a pixel.
    """
    named = {
        key.rstrip("_").replace("_", "-"): _attribute(value)
        for key, value in attributes.items()
        if value is not None
    }
    element = Element(name, named)
    for child in children:
        _add(element, child)
    return element


def _attribute(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1f}".removesuffix(".0")
    return printable(str(value))


def _add(element: Element, child: Child | Iterable[Child]) -> None:
    if child is None:
        return
    if isinstance(child, Element):
        element.append(child)
    elif isinstance(child, str):
        _add_text(element, printable(child))
    else:
        for one in child:
            _add(element, one)


def _add_text(element: Element, text: str) -> None:
    if len(element):
        element[-1].tail = (element[-1].tail or "") + text
    else:
        element.text = (element.text or "") + text


def table(
    headers: Sequence[str],
    rows: Sequence[Sequence[Child]],
    *,
    numbers: Sequence[int] = (),
    whole: int | None = None,
    class_: str | None = None,
) -> Element:
    """Return a table that scrolls by itself where the page is narrow.

    Args:
        headers: Names of the columns.
        rows: Cells.
        numbers: Columns that are set to the right.
        whole: Column that has a line of its own on a phone, where each row is a card.
        class_: Class of the table.
    """

    def cell(column: int, content: Child) -> Element:
        kind = "number" if column in numbers else "whole" if column == whole else None
        label = None if whole is None else headers[column]
        return tag("td", content, class_=kind, data_label=label)

    head = [tag("th", h, class_="number" if n in numbers else None) for n, h in enumerate(headers)]
    body = [tag("tr", [cell(n, content) for n, content in enumerate(row)]) for row in rows]
    kinds = class_ if whole is None else "cards"
    return tag(
        "div",
        tag("table", tag("thead", tag("tr", head)), tag("tbody", body), class_=kinds),
        class_="scroll",
        tabindex=0,
    )


def document(title: str, body: Sequence[Element]) -> str:
    """Return the page as one file: its own styles and script, and leave to load nothing else."""
    folder = files("lora_advisor.advisor")
    style = (folder / "page.css").read_text("utf-8")
    script = (folder / "page.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    page = tag(
        "html",
        tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", http_equiv="Content-Security-Policy", content=policy),
            tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name_="color-scheme", content="light dark"),
            tag("title", title),
            raw("style", style),
        ),
        tag("body", tag("main", body), tag("div", id="tip", role="status", hidden=""),
            raw("script", script)),
        lang="en",
    )  # fmt: skip
    return "<!doctype html>\n" + tostring(page, encoding="unicode", method="html") + "\n"


def raw(name: str, text: str) -> Element:
    """Return a style or script of our own; HTML reads its text as it is."""
    element = Element(name)
    element.text = text
    return element
