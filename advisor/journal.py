"""progress.jsonl: what a training reports, a line each, for programs that watch it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from pathlib import Path
from typing import Any

from lora_advisor.advisor.outcome import Progress

#: Name of the file in the run's folder.
JOURNAL = "progress.jsonl"


class Journal:
    """Appends lines, each there for others as soon as it is written.

    A process that goes on with a training appends too: of two lines for a step the later counts.
    """

    def __init__(self, folder: Path) -> None:
        """Take the run's folder; what a power loss left of a last line is ended."""
        self._file = folder / JOURNAL
        with self._file.open("ab+") as stream:
            if stream.tell():
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":
                    stream.write(b"\n")

    def report(self, state: Progress) -> None:
        """Write how the training stands."""
        self._append({"event": "progress", **dataclasses.asdict(state)})

    def note(self, event: str, text: str) -> None:
        """Write that something has happened."""
        self._append({"event": event, "text": text})

    def _append(self, values: dict[str, Any]) -> None:
        known = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"time": time.time(), **known}) + "\n")


class NoJournal(Journal):
    """Of a process that leaves the writing to the first one."""

    def __init__(self) -> None:
        """Take nothing."""

    def _append(self, values: dict[str, Any]) -> None:
        pass
