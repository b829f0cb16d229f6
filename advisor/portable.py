"""Measured runs as lines that can be given away: nothing private, a hash each, checked on reading.

A line is that of a record (`probes/record.py`) with a `hash` beside it, less what is unknown and
what tells of the machine's user: `detail` (an error's words may hold a path), and names of models
that are not public here. So a file of such lines is a record too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lora_advisor.probes.architectures import (
    Architecture,
    bundled_names,
    from_hf_config,
    hub_id_of,
    load_bundled,
    with_layers,
)
from lora_advisor.probes.errors import AdvisorError, DataError, MissingInputError, UsageError
from lora_advisor.probes.machine import Machine
from lora_advisor.probes.record import FORMAT, OUTCOMES, ProbeResult

#: Fields of a config.json that name a place, whatever they hold.
_NAMES = ("_name_or_path", "name_or_path")


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line that can be given away.

    Attributes:
        result: The run.
        hash: SHA-256 of all else in the line, which tells runs apart and shows a change.
        text: The line, without its end.
    """

    result: ProbeResult
    hash: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class BadLine:
    """A line that is not taken.

    Attributes:
        number: Counted from 1.
        reason: What is wrong with it.
    """

    number: int
    reason: str


def portable(result: ProbeResult) -> Line:
    """Return a run as it can be given away; what was so already comes out the same."""
    figures = _without_places(result.hf_config)
    fingerprint = result.architecture
    if from_hf_config("", figures).fingerprint != from_hf_config("", result.hf_config).fingerprint:
        fingerprint = from_hf_config("", figures).fingerprint
    cleaned = dataclasses.replace(
        result,
        hf_config=figures,
        architecture=fingerprint,
        config=dataclasses.replace(result.config, model=_public_name(result, fingerprint)),
        detail=None,
    )
    data = {"format": FORMAT, **_known(cleaned.to_json())}
    for part in ("machine", "stack"):
        data[part] = _known(data[part])
    found = digest(data)
    return Line(result=cleaned, hash=found, text=json.dumps({**data, "hash": found}))


def digest(data: Mapping[str, Any]) -> str:
    """Return the hash of a line's fields, in whatever order they stand; `hash` does not count."""
    rest = {key: value for key, value in data.items() if key != "hash"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def name_of(hf_config: Mapping[str, Any], fingerprint: str) -> str:
    """Return the bundled name of figures, "NAME, N layers" of some of its layers, else a hash."""
    if fingerprint in _bundled():
        return _bundled()[fingerprint]
    layers = from_hf_config("", hf_config).num_layers
    for name in bundled_names():
        whole = load_bundled(name)
        if layers and (whole.num_layers or 0) > layers and _is_cut(whole, layers, fingerprint):
            return f"{name}, {layers} layers"
    return f"architecture-{fingerprint}"


def _is_cut(whole: Architecture, layers: int, fingerprint: str) -> bool:
    return with_layers(whole, layers).fingerprint == fingerprint


@cache
def _bundled() -> dict[str, str]:
    return {load_bundled(name).fingerprint: name for name in bundled_names()}


def _public_name(result: ProbeResult, fingerprint: str) -> str:
    """Return a model's name if it is one of the package's; a path or another name may be private.

    What looks like a hub id may be a folder, so only those of bundled models are kept.
    """
    name = result.config.model
    public = {*bundled_names(), *(str(hub_id_of(each)).lower() for each in bundled_names())}
    if name.lower() in public:
        return name
    return name_of(result.hf_config, fingerprint).split(",")[0]


def _without_places(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a model without anything that may be a path."""
    return {
        key: _without_places(value) if isinstance(value, Mapping) else value
        for key, value in figures.items()
        if key not in _NAMES and not _has_place(value)
    }


def _has_place(value: object) -> bool:
    if isinstance(value, str):
        return "/" in value or "\\" in value
    return isinstance(value, list) and any(_has_place(item) for item in value)


def _known(data: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what is unknown: a field that a newer program adds changes no older hash."""
    return {key: value for key, value in data.items() if value is not None}


def read_portable(path: Path) -> tuple[list[Line], list[BadLine]]:
    """Return the lines of a file that can be taken, each once, and those that cannot.

    Raises:
        MissingInputError: There is no such file.
        DataError: It is no text.
    """
    try:
        lines = path.read_text("utf-8").split("\n")
    except FileNotFoundError:
        raise MissingInputError(
            f"`{path}` must be a file of `records export`, but it is not there."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"`{path}` must be a file of `records export`, but {error}.") from None
    good: dict[str, Line] = {}
    bad = []
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            line = _checked(text)
        except (AdvisorError, KeyError, TypeError, AttributeError, ValueError) as error:
            bad.append(BadLine(number=number, reason=_reason(error)))
            continue
        good.setdefault(line.hash, line)
    return list(good.values()), bad


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return "it must be JSON, but it is damaged"
    if isinstance(error, KeyError):
        return f"it lacks the field {error}"
    return str(error).rstrip(".")


def _checked(text: str) -> Line:
    """Read one line; any exception says what is wrong with it."""
    data = json.loads(text)
    if not isinstance(data, dict):
        raise DataError("it must be a JSON object")
    if data.get("format") != FORMAT:
        raise DataError(f"it must be of format {FORMAT}, but is of {data.get('format')!r}")
    if "hash" not in data:
        raise DataError("it has no `hash`; only lines of `records export` are taken")
    if data["hash"] != digest(data):
        raise DataError("its hash is not that of its content: it was changed")
    result = ProbeResult.from_json(data)
    _check_kinds(result)
    figures = from_hf_config("", result.hf_config, source="hf_config")
    if figures.fingerprint != result.architecture:
        raise DataError("`architecture` is not the fingerprint of `hf_config`")
    return Line(result=result, hash=data["hash"], text=json.dumps(data))


def _check_kinds(result: ProbeResult) -> None:
    """Refuse values that no measurement gives: their models would be taught nonsense."""
    if result.outcome not in OUTCOMES:
        raise UsageError(f"`outcome` must be one of {', '.join(OUTCOMES)}")
    machine: Machine = result.machine
    if machine.kind not in ("cuda", "cpu"):
        raise UsageError('`machine.kind` must be "cuda" or "cpu": runs of a device')
    for owner in (result, machine, result.stack):
        for field in dataclasses.fields(owner):
            holds = _KINDS.get(str(field.type))
            value = getattr(owner, field.name)
            if holds is not None and not holds(value):
                raise UsageError(f"`{field.name}` must be {field.type}, but is {value!r}")


def _number(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value >= 0  # type: ignore[arg-type, operator]


def _whole(value: object) -> bool:
    return _number(value) and isinstance(value, int)


def _text(value: object) -> bool:
    return isinstance(value, str)


def _or_none(holds: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or holds(value)


def _each(holds: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, Iterable) and all(holds(item) for item in value)


#: What a field may hold, by the words of its annotation. Temperatures below zero are no GPU's.
_KINDS: dict[str, Callable[[object], bool]] = {
    "int": _whole,
    "int | None": _or_none(_whole),
    "float | None": _or_none(_number),
    "str": _text,
    "str | None": _or_none(_text),
    "bool | None": _or_none(lambda value: isinstance(value, bool)),
    "tuple[float, ...]": _each(lambda value: _number(value) and value != 0),
    "tuple[str, ...] | None": _or_none(_each(_text)),
}
