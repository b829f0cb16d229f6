"""Rows for training, from what a user has: their shape is known by the columns of the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_advisor.probes.collator import Collator, random_rows
from lora_advisor.probes.errors import DataError
from lora_advisor.probes.pairs import is_labelled, sides_of
from lora_advisor.probes.rows import Row
from lora_advisor.probes.sources import read_source
from lora_advisor.probes.turns import OPTIONAL, ROLES, SHAPES, Turn, shape_of, tools_of, turns_of

__all__ = [
    "ROLES",
    "SHAPES",
    "Collator",
    "Example",
    "Examples",
    "Turn",
    "random_rows",
    "read_examples",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One row.

    Attributes:
        turns: What is said in it.
        line: Where it stands in its file: the line, or the number of the row.
        file: The file.
        tools: What the model may call; None for nothing.
    """

    turns: tuple[Turn, ...]
    line: int
    file: str
    tools: Sequence[Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The rows of a file, a folder or a data set on the hub.

    Attributes:
        path: What was read.
        kind: What kind of files: one of the values of `KINDS` (probes/files.py), or "hub".
        files: The files, in the order in which they were read.
        shape: One of `SHAPES`.
        columns: The columns that are read, of the first row: they decided the shape, or are used
            where they are.
        unused: Its other columns.
        sha256: Of the content.
        rows: In the order of the files.
    """

    path: Path
    kind: str
    files: tuple[str, ...]
    shape: str
    columns: tuple[str, ...]
    unused: tuple[str, ...]
    sha256: str
    rows: tuple[Example, ...]


def read_examples(path: Path) -> Examples:
    """Read the rows of a file, a folder or a data set on the hub (`hub:owner/name`).

    Raises:
        MissingInputError: There is no such thing.
        DataError: It cannot be read, is empty, or a row has no known shape.
    """
    path = Path(path)
    source = read_source(path)
    first = source.rows[0]
    shape = _shape(first)
    columns = [name for name in (*SHAPES[shape], *OPTIONAL.get(shape, ())) if name in first.values]
    return Examples(
        path=path,
        kind=source.kind,
        files=source.files,
        shape=shape,
        columns=tuple(columns),
        unused=tuple(str(name) for name in first.values if name not in columns),
        sha256=source.sha256,
        rows=tuple(_example(row, shape) for row in source.rows),
    )


def _example(row: Row, shape: str) -> Example:
    return Example(
        turns=turns_of(row, shape), line=row.line, file=row.file, tools=tools_of(row, shape)
    )


def _shape(row: Row) -> str:
    """Return the shape of the first row; every other row is held to it."""
    preference = _preference(row.values)
    if preference is not None:
        raise DataError(
            f"`{row.file}`, row {row.line} has the shape preference ({preference}, but stage sft "
            "learns from good answers alone; bring rows with one each."
        )
    shape = shape_of(row.values)
    if shape is not None:
        return shape
    known = "; ".join(", ".join(columns) for columns in SHAPES.values())
    raise DataError(
        f"`{row.file}`, row {row.line} has the columns {', '.join(map(str, row.values)) or 'none'},"
        f" but must have those of a known shape: {known}."
    )


def _preference(values: Mapping[str, Any]) -> str | None:
    """Return what makes a row one of preference, and what it is for; None for another row."""
    sides = sides_of(values)
    if sides is not None:
        return f"`{sides[0]}` and `{sides[1]}`): pairs of a good and a bad answer are for stage dpo"
    return "`label`): answers called good or bad are for KTO" if is_labelled(values) else None
