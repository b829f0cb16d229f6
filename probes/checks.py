"""Checks of single values, each with the sentence that names what was wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_advisor.probes.errors import UsageError


def fields_of(cls: type, data: object, *, where: str) -> dict[str, Any]:
    """Return `data` as keyword arguments of the dataclass `cls`, with all names checked."""
    if not isinstance(data, Mapping):
        raise UsageError(
            f"`{where.rstrip('.') or 'config'}` must be a JSON object, but got {data!r}."
        )
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise UsageError(
            f"`{where}{unknown[0]}` is not a field of {cls.__name__}; the fields are "
            f"{', '.join(fields)}."
        )
    missing = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and name not in data
    ]
    if missing:
        raise UsageError(f"`{where}{missing[0]}` must be given: it has no default.")
    return dict(data)


def check_word(name: str, value: object, words: tuple[str, ...]) -> None:
    """Refuse a word that is not one of `words`."""
    if value not in words:
        raise UsageError(f"`{name}` must be one of {', '.join(words)}, but got {value!r}.")


def check_flag(name: str, value: object) -> None:
    """Refuse what is neither true nor false."""
    if not isinstance(value, bool):
        raise UsageError(f"`{name}` must be true or false, but got {value!r}.")


def check_whole(name: str, value: object, *, least: int) -> None:
    """Refuse what is no whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"`{name}` must be a whole number of at least {least}, but got {value!r}.")


def check_number(name: str, value: object, *, above: float | None) -> None:
    """Refuse what is no number, or not above `above`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"`{name}` must be a number, but got {value!r}.")
    if above is not None and not value > above:
        raise UsageError(f"`{name}` must be above {above}, but got {value!r}.")
