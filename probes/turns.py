"""What is said in a row: turns of a conversation, from the columns of each shape.

What is not covered: images, sound and video; weights of a turn other than 0 (not trained) and more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_advisor.probes.errors import DataError
from lora_advisor.probes.rows import Row, kind_name

#: The shapes a row may have, by the columns it must bring; the first that matches is taken.
SHAPES: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "ShareGPT": ("conversations",),
    "prompt/completion": ("prompt", "completion"),
    "question/answer": ("question", "answer"),
    "instruction": ("instruction", "output"),
    "instruction/response": ("instruction", "response"),
    "prompt/response": ("prompt", "response"),
    "HumanEval": ("prompt", "canonical_solution"),
    "input/output": ("input", "output"),
    "text": ("text",),
    "content": ("content",),
}

#: Columns that are read where a row brings them, by the shape.
OPTIONAL: Mapping[str, tuple[str, ...]] = {
    "messages": ("system", "tools"),
    "ShareGPT": ("system", "tools"),
    "instruction": ("input", "system", "history"),
    "instruction/response": ("context", "system"),
    "prompt/completion": ("system", "tools"),
}

#: Names of the speakers in the data sets seen, and the roles that chat templates know.
ROLES: Mapping[str, str] = {
    "system": "system",
    "developer": "system",
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

#: Who speaks in a turn, and what: the keys of OpenAI's messages, and those of ShareGPT.
_KEYS = (("role", "content"), ("from", "value"))
#: What a turn says besides its content, under the names that chat templates know.
_MORE = ("tool_calls", "tool_call_id", "name", "reasoning_content")
#: Names under which a turn may carry a 0: its answer shall not be trained.
_WEIGHTS = ("weight", "loss_weight", "train")
#: Columns of a row that this cannot show to a model.
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What one speaker says.

    Attributes:
        role: One of the values of `ROLES`, or "text" for plain text.
        content: The text.
        more: Tool calls, reasoning and names, for a chat template; None for none.
        trained: Whether an answer is to be learnt.
    """

    role: str
    content: str
    more: Mapping[str, Any] | None = None
    trained: bool = True


def turns_of(row: Row, shape: str) -> tuple[Turn, ...]:
    """Return the turns of a row.

    Raises:
        DataError: A column is missing or does not hold what it must.
    """
    where = f"`{row.file}`, row {row.line}"
    values = row.values
    for column in SHAPES[shape]:
        if column not in values:
            raise DataError(_missing(where, values, shape, column))
    for column in _MEDIA:
        if values.get(column):
            raise DataError(
                f"{where} must be text alone, but has `{column}`: models of language only are "
                "trained here."
            )
    match shape:
        case "text" | "content":
            return (Turn(role="text", content=_string(where, shape, values[shape])),)
        case "messages" | "ShareGPT":
            turns = _conversation(where, values[SHAPES[shape][0]])
        case _:
            turns = _asked_and_answered(where, values, shape)
    if values.get("system") and "system" in OPTIONAL.get(shape, ()) and turns[0].role != "system":
        system = _string(where, "system", values["system"])
        turns = (Turn(role="system", content=system), *turns)
    return turns


def tools_of(row: Row, shape: str) -> Sequence[Any] | None:
    """Return the tools that a row offers to the model; None for none.

    Raises:
        DataError: They are not a list, nor one written as JSON.
    """
    if "tools" not in OPTIONAL.get(shape, ()):
        return None
    tools = _parsed(row.values.get("tools"))
    if not tools:
        return None
    if not isinstance(tools, list):
        raise DataError(
            f"`{row.file}`, row {row.line}: `tools` must be a list of tools, but got "
            f"{kind_name(tools)}."
        )
    return [_without_nulls(tool) for tool in tools]


def shape_of(values: Mapping[str, Any]) -> str | None:
    """Return the first shape whose columns a row has; None for none."""
    for shape, columns in SHAPES.items():
        if all(column in values for column in columns):
            return shape
    return None


def _missing(where: str, values: Mapping[str, Any], shape: str, column: str) -> str:
    has = ", ".join(map(str, values)) or "none"
    other = shape_of(values)
    advice = f"; it has the shape {other}: put rows of one shape into a file" if other else ""
    return (
        f"{where} must have the column `{column}` like the rows before it (shape {shape}), but has "
        f"only {has}{advice}."
    )


def _asked_and_answered(where: str, values: Mapping[str, Any], shape: str) -> tuple[Turn, ...]:
    ask, reply = SHAPES[shape]
    if isinstance(values[ask], list) and isinstance(values[reply], list):  # TRL's chat form of it
        return _conversation(where, values[ask] + values[reply])
    asked = _string(where, ask, values[ask])
    for column in ("input", "context"):
        if column in OPTIONAL.get(shape, ()) and values.get(column):
            more = _string(where, column, values[column])
            asked = f"{asked}\n\n{more}" if asked else more
    answer = _string(where, reply, values[reply])
    before = _history(where, values.get("history")) if shape == "instruction" else ()
    return (*before, Turn(role="user", content=asked), Turn(role="assistant", content=answer))


def _history(where: str, pairs: object) -> tuple[Turn, ...]:
    """Return the turns before the last question, from pairs of question and answer."""
    turns: list[Turn] = []
    for pair in _parsed(pairs) or ():
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(
                f"{where}: `history` must be a list of pairs of question and answer, but holds "
                f"{kind_name(pair)}."
            )
        for role, said in zip(("user", "assistant"), pair, strict=True):
            turns.append(Turn(role=role, content=_string(where, "history", said)))
    return tuple(turns)


def _conversation(where: str, turns: object) -> tuple[Turn, ...]:
    turns = _parsed(turns)
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where} must hold a list of turns, but got {kind_name(turns)}.")
    result = tuple(_turn(where, turn) for turn in turns)
    if not any(turn.role == "assistant" for turn in result):
        raise DataError(f"{where} must have a turn of the assistant to learn from, but has none.")
    return result


def _turn(where: str, turn: object) -> Turn:
    """Return a turn with either pair of keys: some files of one shape use those of the other."""
    if not isinstance(turn, Mapping) or not any(turn.get(speaker) for speaker, _ in _KEYS):
        raise DataError(
            f"{where}: every turn must have `role` and `content`, or `from` and `value`, but got "
            f"{turn!r:.80}."
        )
    speaker, said = next(keys for keys in _KEYS if turn.get(keys[0]))
    more = {name: turn[name] for name in _MORE if turn.get(name)}
    if said not in turn and "tool_calls" not in more:
        raise DataError(
            f"{where}: every turn must have `{speaker}` and `{said}`, but got {turn!r:.80}."
        )
    role = ROLES.get(str(turn[speaker]).lower())
    if role is None:
        raise DataError(
            f"{where}: `{speaker}` must be one of {', '.join(ROLES)}, but got {turn[speaker]!r}."
        )
    content = turn.get(said)
    if isinstance(content, list):
        content = _parts(where, said, content, more)
    elif str(turn[speaker]).lower() == "function_call" and _is_call(content):
        content, more["tool_calls"] = "", [content]  # as ShareGPT files write it
    elif content is None and "tool_calls" in more:
        content = ""
    if "tool_calls" in more:
        more["tool_calls"] = [_call(where, call) for call in _parsed(more["tool_calls"])]
    trained = not any(turn.get(name) in (0, False) for name in _WEIGHTS if name in turn)
    return Turn(
        role=role, content=_string(where, said, content), more=more or None, trained=trained
    )


def _parts(where: str, name: str, parts: list[Any], more: dict[str, Any]) -> str:
    """Return the text of typed parts, joined; reasoning and calls of tools go into `more`."""
    texts: list[str] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        value = part.get("text", part.get("value")) if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(value, str):
            texts.append(value)
        elif kind == "reasoning" and isinstance(value, str):
            more["reasoning_content"] = more.get("reasoning_content", "") + value
        elif kind == "tool_call" and isinstance(value, str):
            more["tool_calls"] = [*more.get("tool_calls", ()), value]
        else:
            which = f" with a part of type {kind!r}" if kind is not None else ""
            raise DataError(f"{where}: `{name}` must be text, but got a list{which}.")
    return "".join(texts)


def _is_call(content: object) -> bool:
    call = _parsed(content)
    return isinstance(call, Mapping) and isinstance(call.get("name"), str)


def _call(where: str, given: object) -> dict[str, Any]:
    """Return a call of a tool as chat templates take it, its arguments an object."""
    call: Any = _parsed(given)
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"{where}: a call of a tool must have a `name`, but got {call!r:.80}.")
    arguments = _without_nulls(_parsed(function.get("arguments", {})))
    made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    # Some templates want to see it (Mistral's).
    return {**made, "id": call["id"]} if function is not call and call.get("id") else made


def _parsed(value: object) -> Any:
    """Return what a text holds that is JSON itself, as CSV files and some data sets keep lists."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _without_nulls(value: object) -> Any:
    """Leave out the keys without a value: Arrow gives every object the keys of all."""
    if isinstance(value, Mapping):
        return {name: _without_nulls(v) for name, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _string(where: str, name: str, value: object) -> str:
    """Return a text; numbers are written out."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{where}: `{name}` must be text, but got {kind_name(value)}.")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{where}: `{name}` must be Unicode text, but holds half a character."
            ) from None
    return value
