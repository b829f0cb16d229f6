"""Preference pairs for stage "dpo": a prompt, an answer to prefer, and one to avoid.

What is covered: TRL's explicit and implicit prompts, as texts or as lists of turns;
LLaMA-Factory's `conversations` or `instruction` beside `chosen` and `rejected`, and its
`chosen_messages` and `rejected_messages`. What is not: single answers with a `label` (KTO), and
rankings of more than two.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_advisor.probes.errors import DataError
from lora_advisor.probes.rows import Row, kind_name
from lora_advisor.probes.sources import read_source
from lora_advisor.probes.turns import ROLES, Turn, shape_of, tools_of, turns_of

#: Names of the columns that hold the answer to prefer and the one to avoid.
SIDES = (("chosen", "rejected"), ("chosen_messages", "rejected_messages"))
#: Columns that may stand before both answers; the first that a row has is taken.
_PROMPTS = ("conversations", "messages", "prompt", "instruction", "question")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One row of pairs.

    Attributes:
        prompt: What both answers follow, at least one turn.
        chosen: The answer to prefer, at least one turn; of role "text" where the row is texts
            without roles, which stand as they are.
        rejected: The answer to avoid.
        line: Where it stands in its file.
        file: The file.
        tools: What the model may call; None for nothing.
    """

    prompt: tuple[Turn, ...]
    chosen: tuple[Turn, ...]
    rejected: tuple[Turn, ...]
    line: int
    file: str
    tools: Sequence[Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The pairs of a file, a folder or a data set on the hub.

    Attributes:
        path: What was read.
        columns: The columns that made the pairs, of the first row.
        sha256: Of the content.
        rows: In the order of the files.
    """

    path: Path
    columns: tuple[str, ...]
    sha256: str
    rows: tuple[Pair, ...]

    @property
    def shape(self) -> str:
        """What a training calls the shape of its rows."""
        return "preference"


def read_pairs(path: Path) -> Pairs:
    """Read pairs from what `read_source` reads.

    Raises:
        MissingInputError: There is no such thing.
        DataError: It cannot be read, or a row is no pair.
    """
    path = Path(path)
    source = read_source(path)
    first = source.rows[0]
    sides = sides_of(first.values)
    if sides is None:
        raise DataError(_no_pair(first))
    before = _prompt_of(first.values)
    return Pairs(
        path=path,
        columns=(*sides, *([before] if before else ())),
        sha256=source.sha256,
        rows=tuple(_pair(row, sides) for row in source.rows),
    )


def sides_of(values: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return which of `SIDES` a row has; None for none."""
    return next((sides for sides in SIDES if all(name in values for name in sides)), None)


def is_labelled(values: Mapping[str, Any]) -> bool:
    """Return whether a row is one answer that is called good or bad, as KTO takes it."""
    answered = shape_of(values) in ("messages", "ShareGPT", "prompt/completion")
    return answered and isinstance(values.get("label"), bool)


def _no_pair(row: Row) -> str:
    has = ", ".join(map(str, row.values)) or "none"
    shape = shape_of(row.values)
    what = f"; the shape {shape} is for stage sft" if shape else ""
    if is_labelled(row.values):
        what = "; single answers with a `label` are for KTO, which is not trained here"
    return (
        f"`{row.file}`, row {row.line} must have `chosen` and `rejected` for stage dpo, but has "
        f"the columns {has}{what}."
    )


def _pair(row: Row, sides: tuple[str, str]) -> Pair:
    where = f"`{row.file}`, row {row.line}"
    for name in sides:
        if name not in row.values:
            raise DataError(_no_pair(row))
        if not row.values[name]:
            raise DataError(f"{where}: `{name}` must hold an answer, but is empty.")
    chosen, rejected = (_whole(row, sides, name) for name in sides)
    if chosen[0].role == rejected[0].role == "text":
        return _parted_texts(row, chosen[0].content, rejected[0].content)
    # An answer is left where both are the same.
    shared = min(_alike(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    if shared < 1:
        raise DataError(
            f"{where} must have one prompt for both answers, but `{sides[0]}` and `{sides[1]}` "
            "begin differently."
        )
    return Pair(
        prompt=chosen[:shared],
        chosen=chosen[shared:],
        rejected=rejected[shared:],
        line=row.line,
        file=row.file,
        tools=tools_of(row, "messages"),
    )


def _whole(row: Row, sides: tuple[str, str], name: str) -> tuple[Turn, ...]:
    """Return the conversation that ends with one of the answers.

    What both have alike is then the prompt. Turns of the assistant among it take no part in DPO's
    loss either way: it is a difference.
    """
    answer: Any = _turns(row.values[name])
    others = {key: value for key, value in row.values.items() if key not in sides}
    if not isinstance(answer, str | int | float) and not _are_turns(answer):
        raise DataError(
            f"`{row.file}`, row {row.line}: `{name}` must be text or turns, but got "
            f"{kind_name(answer)}."
        )
    before = _prompt_of(others)
    asked = None if before is None else _turns(others[before])
    values: dict[str, Any]
    if before == "instruction" and not isinstance(answer, list):
        values, shape = {"output": answer}, "instruction"
    elif isinstance(answer, list) or isinstance(asked, list):
        if not isinstance(answer, list):
            answer = [{"role": "assistant", "content": answer}]
        values, shape = {"messages": _joined(row, others, before, asked, answer)}, "messages"
    elif before is None:
        values, shape = {"text": answer}, "text"
    else:
        values, shape = {"prompt": asked, "completion": answer}, "prompt/completion"
    return turns_of(Row(row.file, row.line, {**others, **values}), shape)


def _prompt_of(values: Mapping[str, Any]) -> str | None:
    return next((name for name in _PROMPTS if values.get(name)), None)


def _joined(
    row: Row, others: Mapping[str, Any], before: str | None, asked: Any, answer: list[Any]
) -> list[Any]:
    """Return a prompt's turns and an answer's; an answer may bring the prompt along.

    So it does in data sets that repeat the prompt in a column of its own (trl/data_utils.py,
    `maybe_extract_prompt`).
    """
    if asked is None:
        return answer
    if isinstance(asked, list):
        return answer if answer[: len(asked)] == asked else [*asked, *answer]
    if ROLES.get(str(answer[0].get("role") or answer[0].get("from")).lower()) in ("system", "user"):
        return answer
    if others.get("input"):
        raise DataError(
            f"`{row.file}`, row {row.line} must have answers that are text beside `{before}` and "
            "`input`, but they are turns."
        )
    return [{"role": "user", "content": asked}, *answer]


def _parted_texts(row: Row, chosen: str, rejected: str) -> Pair:
    """Part two texts without roles behind what they have alike, before its last space.

    So does TRL (trl/data_utils.py, `extract_prompt`): the space belongs to the next word's token.
    """
    alike = _alike(chosen, rejected)
    alike -= alike > 0 and chosen[alike - 1] == " "
    if not chosen[:alike].strip() or not chosen[alike:] or not rejected[alike:]:
        raise DataError(
            f"`{row.file}`, row {row.line} must have a `prompt`, or two texts that begin alike and "
            "end differently, but has neither."
        )
    parts = (chosen[:alike], chosen[alike:], rejected[alike:])
    prompt, good, bad = ((Turn(role="text", content=text),) for text in parts)
    return Pair(prompt=prompt, chosen=good, rejected=bad, line=row.line, file=row.file)


def _alike(left: Sequence[object], right: Sequence[object]) -> int:
    """Return how much two sequences share from the start on."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((n for n, (one, other) in pairs if one != other), min(len(left), len(right)))


def _turns(value: object) -> Any:
    """Return a list of turns, also from a single one and from JSON (as in CSV); texts stay."""
    turns = value
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            turns = json.loads(value)
        except ValueError:
            return value
    turns = [turns] if isinstance(turns, Mapping) else turns
    return turns if _are_turns(turns) else value


def _are_turns(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, Mapping) and ("role" in turn or "from" in turn) for turn in value)
    )
