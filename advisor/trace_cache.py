"""What traces came to, kept on disk; a file of another version or a damaged one is made anew.

An entry's key covers all that decides it: the architecture's figures, the configuration, the card's
capability, the installed stack and the source of what traces. So nothing that has changed is found.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from functools import cache
from pathlib import Path
from typing import Any

from lora_advisor.probes.machine import Stack

#: Raised when the form of an entry changes.
FORMAT = 1
#: Entries kept; the oldest go first. An entry is some 2 kB, with its events 60 kB.
_ENTRIES = 4000
#: What decides a trace and its replay: of the models those three, of the probes all but what runs,
#: measures and records them.
_MODELS = ("allocator.py", "replayed.py", "traced.py")
_NOT_TRACING = (
    "cards.py", "child.py", "cutting.py", "energy.py", "exchange.py", "files.py", "forkserver.py",
    "hub.py", "json_rows.py", "layout.py", "machine.py", "meter.py", "nvml.py", "pairs.py",
    "plan.py", "prediction.py", "record.py", "rivals.py", "rows.py", "runner.py", "sources.py",
    "spec.py", "stopwatch.py", "tokens.py", "trace_batch.py", "trail.py", "turns.py", "worker.py",
)  # fmt: skip


class TraceCache:
    """Entries by key in one SQLite file; a cache that cannot be used is an empty one."""

    def __init__(self, path: Path | None) -> None:
        """Open the file, or make it.

        Args:
            path: The file; None to keep nothing.
        """
        self._connection: sqlite3.Connection | None = None
        if path is None:
            return
        for _ in range(2):
            try:
                self._connection = _open(path)
                return
            except sqlite3.OperationalError:  # locked for long, or cannot be opened: it stays
                return
            except sqlite3.DatabaseError:
                with contextlib.suppress(OSError):
                    path.unlink()
            except OSError:
                return

    def get(self, key: str) -> dict[str, Any] | None:
        """Return an entry; None if there is none, or none that is whole."""
        row = self._run("SELECT value, digest FROM entries WHERE key = ?", key)
        if row is None or row[1] != _digest(row[0]):
            return None
        value: dict[str, Any] = json.loads(row[0])
        return value

    def events(self, key: str) -> bytes | None:
        """Return the events kept with an entry."""
        row = self._run("SELECT events, events_digest FROM entries WHERE key = ?", key)
        if row is None or row[0] is None or row[1] != _digest(row[0]):
            return None
        return bytes(row[0])

    def put(self, key: str, value: dict[str, Any], events: bytes | None = None) -> None:
        """Keep an entry, and the events it came from."""
        text = json.dumps(value)
        self._run(
            "INSERT INTO entries VALUES (?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET "
            "value = excluded.value, digest = excluded.digest, "
            "events = coalesce(excluded.events, events), "
            "events_digest = coalesce(excluded.events_digest, events_digest)",
            key,
            text,
            _digest(text),
            events,
            None if events is None else _digest(events),
        )

    def _run(self, statement: str, *values: Any) -> Any:
        if self._connection is None:
            return None
        try:
            with self._connection:
                return self._connection.execute(statement, values).fetchone()
        except sqlite3.Error:  # locked for long, full disk, damaged page: go on without
            self._connection = None
            return None


def _open(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, timeout=2.0)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version != FORMAT:
        connection.execute("DROP TABLE IF EXISTS entries")
        connection.execute(f"PRAGMA user_version = {FORMAT}")
    connection.execute(
        "CREATE TABLE IF NOT EXISTS entries "
        "(key TEXT PRIMARY KEY, value TEXT, digest TEXT, events BLOB, events_digest TEXT)"
    )
    with connection:
        connection.execute(
            "DELETE FROM entries WHERE rowid <= (SELECT max(rowid) FROM entries) - ?", (_ENTRIES,)
        )
    return connection


def _digest(value: str | bytes) -> str:
    data = value.encode() if isinstance(value, str) else value
    return hashlib.sha256(data).hexdigest()[:32]


def key_of(stack: Stack, capability: str | None, architecture: str, config: dict[str, Any]) -> str:
    """Return the key of an entry.

    Args:
        stack: The installed versions.
        capability: Of the card.
        architecture: Fingerprint of the model's figures.
        config: JSON form of the configuration.
    """
    parts = [_source(), stack.to_json(), capability, architecture, {**config, "model": ""}]
    return _digest(json.dumps(parts, sort_keys=True))


@cache
def _source() -> str:
    """Return a digest of the modules that make and read traces."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    probes = [p for p in (root / "probes").glob("*.py") if p.name not in _NOT_TRACING]
    for file in sorted([*probes, *(root / "models" / name for name in _MODELS)]):
        digest.update(file.read_bytes())
    return digest.hexdigest()
