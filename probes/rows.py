"""A row of data as it stands in a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Row(NamedTuple):
    """A row as it stands in a file.

    Attributes:
        file: The file, as an error names it.
        line: Its line, or its number where rows are no lines (JSON arrays, parquet, the hub).
        values: Its columns.
    """

    file: str
    line: int
    values: Mapping[str, Any]


def kind_name(value: object) -> str:
    """Return what a value is, as a sentence says it."""
    names: dict[type, str] = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "a truth value",
    }
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")
