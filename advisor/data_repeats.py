"""Rows of a data set that repeat others, contradict others, or answer nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_advisor.probes.dataset import Example

#: Places that are named at most for each kind of finding.
_PLACES = 3


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """Rows that say the same, or answer the same differently.

    Attributes:
        rows: Rows that repeat an earlier one.
        row_places: Where the first of them stand, and whom they repeat.
        prompts: Prompts that have several answers.
        prompt_places: Where the first of them stand.
        empty: Rows with an empty answer.
        empty_places: Where the first of them stand.
    """

    rows: int
    row_places: tuple[str, ...]
    prompts: int
    prompt_places: tuple[str, ...]
    empty: int
    empty_places: tuple[str, ...]


def repeats_of(rows: Sequence[Example]) -> Repeats:
    """Return exact duplicates, prompts with differing answers, and empty answers."""
    first: dict[object, Example] = {}
    answers: dict[object, set[object]] = {}
    repeated: list[str] = []
    asked: dict[object, Example] = {}
    empty: list[Example] = []
    for row in rows:
        said = tuple((turn.role, turn.content, _written(turn.more)) for turn in row.turns)
        tools = _written(row.tools)
        earlier = first.setdefault((tools, said), row)
        if earlier is not row:
            repeated.append(f"{place(row)} like {place(earlier)}")
        if row.turns[0].role == "text":
            continue
        last = max(n for n, turn in enumerate(row.turns) if turn.role == "assistant")
        if last > 0:
            prompt = (tools, said[:last])
            answers.setdefault(prompt, set()).add(said[last])
            asked.setdefault(prompt, row)
        if any(
            turn.role == "assistant" and turn.trained and not turn.content.strip() and not turn.more
            for turn in row.turns
        ):
            empty.append(row)
    differing = [asked[prompt] for prompt, given in answers.items() if len(given) > 1]
    return Repeats(
        rows=len(repeated),
        row_places=tuple(repeated[:_PLACES]),
        prompts=len(differing),
        prompt_places=tuple(place(row) for row in differing[:_PLACES]),
        empty=len(empty),
        empty_places=tuple(place(row) for row in empty[:_PLACES]),
    )


def _written(value: Any) -> str:
    """Return what can be compared and hashed for tools and their calls."""
    return "" if value is None else json.dumps(value, sort_keys=True, default=repr)


def place(row: Example) -> str:
    """Return where a row stands, in a few characters."""
    return f"{Path(row.file).name}:{row.line}"
