"""Keys and versions of the trainers of others, as `benchmarks/foreign_keys.py` read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any


@cache
def foreign_keys() -> Mapping[str, Mapping[str, Any]]:
    """Return by trainer: `version`, the versions it goes `with`, and its sets of keys."""
    text = (resources.files(__package__) / "foreign_keys.json").read_text("utf-8")
    keys: Mapping[str, Mapping[str, Any]] = json.loads(text)
    return keys


def versions_of(name: str) -> dict[str, str]:
    """Return the versions that an export for a trainer is written for."""
    known = foreign_keys()[name]
    return {name: known["version"], **known["with"]}
