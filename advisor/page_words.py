"""Tables of words, which the page and the Markdown of a report set each in its own way."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table of words.

    Attributes:
        headers: Names of the columns; empty for pairs of a name and a value.
        rows: Cells.
        numbers: Columns that are set to the right.
        whole: Column of the configuration, where the table has one.
    """

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: tuple[int, ...] = ()
    whole: int | None = None


def sentence(words: str) -> str:
    """Return words that stood in a line as a sentence of their own."""
    return f"{words[:1].upper()}{words[1:]}."
