"""Rows from JSON: lines, an array, or an object around one; and what is wrong with others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lora_advisor.probes.errors import DataError
from lora_advisor.probes.rows import Row, kind_name


def line_rows(file: str, text: str) -> list[Row]:
    """Read JSON lines.

    Raises:
        DataError: A line is no JSON object; the sentence names it.
    """
    rows: list[Row] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(Row(file, number, _mapping(file, number, json.loads(line))))
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"`{file}`, line {number} must be one JSON object, but cannot be read: "
                f"{_fault(error, line, first=not rows)}."
            ) from None
    return rows


def _fault(error: Exception, text: str, *, first: bool = False) -> str:
    """Return what is wrong with JSON, and what likely happened to it."""
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    at = error.pos
    if first and text.strip() in ("[", "{"):
        return "an object or array over several lines; let the file's name end in .json"
    if text[at : at + 1] == "'":
        return "texts stand in single quotes, as Python writes them; JSON needs double quotes"
    if error.msg.startswith("Illegal trailing comma") or (
        text[at : at + 1] in ("]", "}") and text[:at].rstrip().endswith(",")
    ):
        return f"there is a comma too many before character {error.colno}"
    if not text[at:].strip() or error.msg.startswith("Unterminated string"):
        return "it ends too early, as if it had been cut off"
    return f"{error.msg} at character {error.colno}"


def json_rows(file: str, text: str) -> list[Row]:
    """Read an array, an object that holds one list of rows, or JSON lines.

    Raises:
        DataError: It is none of these; the sentence names the line.
    """
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip()[0] == "{":
            return line_rows(file, text)
        raise DataError(
            f"`{file}` must be a JSON array, but it cannot be read: line {error.lineno}: "
            f"{_fault(error, text)}."
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"`{file}` must be a JSON array, but it cannot be read: {error}.") from None
    if isinstance(whole, Mapping):
        whole = _rows_within(file, whole)
    if not isinstance(whole, list):
        raise DataError(f"`{file}` must be a JSON array, but it is {kind_name(whole)}.")
    return [Row(file, n, _mapping(file, n, row)) for n, row in enumerate(whole, start=1)]


#: Names under which an object holds the turns of one row, not rows.
_TURNS = frozenset({"messages", "conversations", "prompt", "completion", "chosen", "rejected"})


def _rows_within(file: str, whole: Mapping[str, Any]) -> list[Any]:
    """Return the one list of objects in an object; an object without any is a row itself."""
    lists = {
        name: value
        for name, value in whole.items()
        if isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value)
    }
    if not lists or lists.keys() & _TURNS:
        return [whole]
    if len(lists) > 1:
        raise DataError(
            f"`{file}` must hold one list of rows, but has {', '.join(f'`{n}`' for n in lists)}; "
            "leave one."
        )
    (rows,) = lists.values()
    return rows


def _mapping(file: str, number: int, row: object) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise DataError(
            f"`{file}`, row {number} must be a JSON object, but it is {kind_name(row)}."
        )
    return row
