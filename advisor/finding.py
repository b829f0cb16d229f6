"""`Finding`: one thing the doctor looked at, what it found, and what to do about it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from lora_advisor.probes.machine import GIB

Status = Literal["ok", "warning", "error", "unknown"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What was looked at; no two findings of one examination share it.
        status: "ok"; "warning" (results are worse or less certain); "error" (something will not
            work); "unknown" (it could not be found out).
        value: What was found.
        advice: What follows from it and what to do; None when there is nothing to say.
    """

    name: str
    status: Status
    value: str
    advice: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return dataclasses.asdict(self)


def say(name: str, status: Status, value: str, advice: str | None = None) -> Finding:
    """Return a `Finding`, its fields in their order."""
    return Finding(name=name, status=status, value=value, advice=advice)


def gib(size_bytes: int) -> str:
    """Write a size for people."""
    return f"{size_bytes / GIB:.1f} GiB"
