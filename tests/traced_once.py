"""A tiny model in a folder, whose traces all tests of a run share."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from recorded import TINY

from lora_advisor.advisor import traces
from lora_advisor.probes.architectures import Architecture
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.events import Trace
from lora_advisor.probes.extend import trace_all_layers

_MADE: dict[tuple[str, RunConfig, str | None], Trace] = {}


def _trace(config: RunConfig, architecture: Architecture, capability: str | None) -> Trace:
    key = (architecture.fingerprint, config.replace(model="tiny"), capability)
    if key not in _MADE:
        _MADE[key] = trace_all_layers(config, architecture, capability=capability)
    return _MADE[key]


def share_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the advisor trace in this process, each step once in a test run."""
    monkeypatch.setattr(traces, "trace_quietly", _trace)
    trace_here(monkeypatch)


def trace_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the advisor start no server that traces side by side."""
    monkeypatch.setattr(traces, "has_imported", lambda: True)
    monkeypatch.setattr(traces, "_WORTH_A_SERVER", sys.maxsize)


def save_figures(folder: Path) -> str:
    """Save a config.json of two layers and return its folder as `--model` takes it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**TINY, "num_hidden_layers": 2}))
    return str(folder)
