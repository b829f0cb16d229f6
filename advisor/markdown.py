"""Text of others in Markdown: as it is, and never as markup."""

from __future__ import annotations

import re
from collections.abc import Sequence

#: What CommonMark, its tables and the hub's formulas give a meaning to.
_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|~&$])")


def plain(text: object) -> str:
    """Return text for a line or a cell of a table."""
    return _MARKUP.sub(r"\\\1", " ".join(printable(str(text)).split()))


def fenced(text: str, language: str = "text") -> str:
    """Return text as a block of code, its fence longer than any within."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{printable(text)}\n{fence}"


def table(rows: Sequence[Sequence[object]], headers: Sequence[str]) -> str:
    """Return a table; its cells are escaped."""
    from tabulate import tabulate

    cells = [[plain(cell) for cell in row] for row in rows]
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True)


def printable(text: str) -> str:
    """Return text with control characters, and halves of characters, written out."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(
        char if char in "\n\t" or char.isprintable() else char.encode("unicode_escape").decode()
        for char in text
    )
