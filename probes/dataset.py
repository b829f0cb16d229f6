"""Rows for training: read from a user's file, or random ones of full length; and their batches.

What is covered: JSON lines, a JSON array and CSV; the columns say which of `SHAPES` the rows have.
What is not: parquet, folders, hub data sets, images, tool definitions.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_advisor.probes.errors import DataError, MissingInputError

#: The shapes a row may have, by the columns it must bring; the first that matches is taken.
SHAPES: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "ShareGPT": ("conversations",),
    "prompt/completion": ("prompt", "completion"),
    "question/answer": ("question", "answer"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}

#: Names of the speakers in the data sets seen, and the roles that chat templates know.
ROLES: Mapping[str, str] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}

#: File endings that can be read.
ENDINGS = (".jsonl", ".ndjson", ".json", ".csv")


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What one speaker says; the role is one of the values of `ROLES`, or "text" for plain text."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One row: its turns, and where it stands in the file (line, or element of the array)."""

    turns: tuple[Turn, ...]
    line: int


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The rows of a file.

    Attributes:
        path: The file.
        shape: One of `SHAPES`.
        sha256: Of the file's bytes.
        rows: In the order of the file.
    """

    path: Path
    shape: str
    sha256: str
    rows: tuple[Example, ...]


def read_examples(path: Path) -> Examples:
    """Read the rows of a JSONL, JSON or CSV file.

    Raises:
        MissingInputError: There is no such file.
        DataError: It cannot be read, is empty, or a row has no known shape.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingInputError(
            f"`{path}` must be a data file ({', '.join(ENDINGS)}), but there is none."
        )
    if path.suffix.lower() not in ENDINGS:
        raise DataError(
            f"`{path}` must end in one of {', '.join(ENDINGS)}, but ends in {path.suffix!r}."
        )
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"`{path}` must be UTF-8 text, but byte {error.start} is not.") from None
    if not text.strip():
        raise DataError(f"`{path}` must hold at least one row, but it is empty.")
    if path.suffix.lower() == ".csv":
        found = _csv_rows(path, text)
    elif path.suffix.lower() == ".json" and text.lstrip()[0] == "[":
        found = _array_rows(path, text)
    else:
        found = _line_rows(path, text)
    if not found:
        raise DataError(f"`{path}` must hold at least one row, but it has none.")
    shape = _shape(path, found)
    rows = tuple(Example(turns=_turns(path, shape, line, row), line=line) for line, row in found)
    return Examples(path=path, shape=shape, sha256=hashlib.sha256(raw).hexdigest(), rows=rows)


#: A row as it stands in the file, with its place.
_Found = list[tuple[int, Mapping[str, Any]]]


def _line_rows(path: Path, text: str) -> _Found:
    found: _Found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                found.append((number, _mapping(path, number, json.loads(line))))
            except ValueError as error:
                raise DataError(
                    f"`{path}`, line {number} must be one JSON object, but cannot be read: {error}."
                ) from None
    return found


def _array_rows(path: Path, text: str) -> _Found:
    try:
        elements = json.loads(text)
    except ValueError as error:
        raise DataError(f"`{path}` must be a JSON array, but it cannot be read: {error}.") from None
    return [(number, _mapping(path, number, row)) for number, row in enumerate(elements, start=1)]


def _csv_rows(path: Path, text: str) -> _Found:
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
    found: _Found = []
    try:
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"`{path}`, line {reader.line_num} must have as many cells as the header "
                    f"({len(reader.fieldnames or ())}), but has more or fewer."
                )
            found.append((reader.line_num, row))
    except csv.Error as error:
        raise DataError(f"`{path}`, line {reader.line_num} must be CSV, but {error}.") from None
    return found


def _mapping(path: Path, number: int, row: object) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise DataError(f"`{path}`, row {number} must be a JSON object, but it is {_kind(row)}.")
    return row


def _shape(path: Path, found: _Found) -> str:
    """Return the shape of the first row; every other row is held to it."""
    line, row = found[0]
    for shape, columns in SHAPES.items():
        if all(column in row for column in columns):
            return shape
    known = "; ".join(", ".join(columns) for columns in SHAPES.values())
    raise DataError(
        f"`{path}`, row {line} has the columns {', '.join(map(str, row)) or 'none'}, but must have "
        f"those of a known shape: {known}."
    )


def _turns(path: Path, shape: str, line: int, row: Mapping[str, Any]) -> tuple[Turn, ...]:
    for column in SHAPES[shape]:
        if column not in row:
            raise DataError(
                f"`{path}`, row {line} must have the column `{column}` like the rows before it, "
                f"but has only {', '.join(map(str, row)) or 'none'}."
            )
    where = f"`{path}`, row {line}"
    match shape:
        case "messages":
            return _conversation(where, row["messages"], ("role", "content"))
        case "ShareGPT":
            return _conversation(where, row["conversations"], ("from", "value"))
        case "text":
            return (Turn(role="text", content=_string(where, "text", row["text"])),)
        case "instruction":
            asked = _string(where, "instruction", row["instruction"])
            more = _string(where, "input", row.get("input") or "")
            answer = _string(where, "output", row["output"])
            asked = f"{asked}\n\n{more}" if more else asked
        case _:
            ask, reply = SHAPES[shape]
            if isinstance(row[ask], list) and isinstance(row[reply], list):  # TRL's chat form of it
                return _conversation(where, row[ask] + row[reply], ("role", "content"))
            asked, answer = _string(where, ask, row[ask]), _string(where, reply, row[reply])
    return (Turn(role="user", content=asked), Turn(role="assistant", content=answer))


def _conversation(where: str, turns: object, keys: tuple[str, str]) -> tuple[Turn, ...]:
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where} must hold a list of turns, but got {_kind(turns)}.")
    result = []
    for turn in turns:
        # Some ShareGPT files use the keys of the messages shape.
        pair = keys if isinstance(turn, Mapping) and keys[0] in turn else ("role", "content")
        if not isinstance(turn, Mapping) or not all(key in turn for key in pair):
            raise DataError(
                f"{where}: every turn must have `{keys[0]}` and `{keys[1]}`, but got {turn!r:.80}."
            )
        role = ROLES.get(str(turn[pair[0]]).lower())
        if role is None:
            known = ", ".join(ROLES)
            raise DataError(
                f"{where}: `{pair[0]}` must be one of {known}, but got {turn[pair[0]]!r}."
            )
        result.append(Turn(role=role, content=_string(where, pair[1], turn[pair[1]])))
    if not any(turn.role == "assistant" for turn in result):
        raise DataError(f"{where} must have a turn of the assistant to learn from, but has none.")
    return tuple(result)


def _string(where: str, name: str, value: object) -> str:
    """Return a text; numbers are written out and the text parts of a message are joined."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list) and all(
        isinstance(part, Mapping)
        and part.get("type") == "text"
        and isinstance(part.get("text"), str)
        for part in value
    ):
        return "".join(part["text"] for part in value)
    raise DataError(f"{where}: `{name}` must be text, but got {_kind(value)}.")


def _kind(value: object) -> str:
    names: dict[type, str] = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "a truth value",
    }
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


@dataclass(frozen=True)
class Collator:
    """Pads rows to the longest of the batch, or on to the next multiple.

    A batch of full rows gets no attention mask, as a user's collator of fixed-length blocks does:
    the mask would switch attention to a slower, larger path.
    """

    pad_token_id: int
    multiple: int = 1

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
        """Return {"input_ids", "labels"[, "attention_mask"]}, each of shape (rows, longest)."""
        import torch

        longest = max(len(row["input_ids"]) for row in rows)
        longest = -(-longest // self.multiple) * self.multiple
        ids = torch.full((len(rows), longest), self.pad_token_id, dtype=torch.long)
        labels = torch.full((len(rows), longest), -100, dtype=torch.long)
        mask = torch.zeros((len(rows), longest), dtype=torch.long)
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[index, :length] = torch.tensor(row["input_ids"])
            labels[index, :length] = torch.tensor(row["labels"])
            mask[index, :length] = 1
        batch = {"input_ids": ids, "labels": labels}
        if any(len(row["input_ids"]) != longest for row in rows):
            batch["attention_mask"] = mask
        return batch


def random_rows(
    count: int, seq_len: int, vocab_size: int, *, seed: int = 0
) -> list[dict[str, list[int]]]:
    """Return `count` rows of `seq_len` random tokens, each with a loss: the worst case."""
    import numpy

    generator = numpy.random.default_rng(seed)
    tokens = generator.integers(min(2, vocab_size - 1), vocab_size, size=(count, seq_len))
    return [{"input_ids": row, "labels": row} for row in tokens.tolist()]
