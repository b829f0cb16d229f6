"""What is kept is found by what decides it, and nothing damaged or outdated is believed."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from recorded import configure, tiny

from lora_advisor.advisor import trace_cache, traces
from lora_advisor.advisor.trace_cache import FORMAT, TraceCache, key_of
from lora_advisor.advisor.traces import TraceStore
from lora_advisor.probes.machine import Stack
from lora_advisor.probes.trace_batch import trace_quietly

STACK = Stack(torch="2.13.0", transformers="5.23.0", peft="0.21.2", trl="1.16.0")
VALUE = {"memory": {"1024": {"allocated_bytes": 512}}, "work": [1.5, 2.0]}
EVENTS = bytes(range(256))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "traces.sqlite"


@contextlib.contextmanager
def opened(file: Path | None) -> Iterator[TraceCache]:
    """Open a cache as a process does that ends."""
    cache = TraceCache(file)
    yield cache
    if cache._connection is not None:
        cache._connection.close()


def key(**changes: Any) -> str:
    values: dict[str, Any] = {
        "stack": STACK,
        "capability": "9.0",
        "architecture": "fingerprint",
        "config": configure().to_json(),
        **changes,
    }
    return key_of(**values)


def rewrite(file: Path, statement: str, *values: Any) -> None:
    """Change the file behind the cache's back."""
    with contextlib.closing(sqlite3.connect(file)) as connection, connection:
        connection.execute(statement, values)


def test_an_entry_is_found_again_by_another_process(file: Path) -> None:
    with opened(file) as cache:
        cache.put(key(), VALUE, EVENTS)

    with opened(file) as cache:
        assert cache.get(key()) == VALUE
        assert cache.events(key()) == EVENTS


def test_two_processes_use_one_file_at_a_time(file: Path) -> None:
    with opened(file) as one, opened(file) as other:
        one.put("a", VALUE)
        other.put("b", VALUE)

        assert other.get("a") == VALUE
        assert one.get("b") == VALUE


def test_an_entry_changed_without_events_keeps_those_it_had(file: Path) -> None:
    with opened(file) as cache:
        cache.put(key(), VALUE, EVENTS)
        cache.put(key(), {"memory": {}, "work": []})

        assert cache.get(key()) == {"memory": {}, "work": []}
        assert cache.events(key()) == EVENTS


@pytest.mark.parametrize(
    "changes",
    [
        {"stack": dataclasses.replace(STACK, torch="2.12.0")},
        {"stack": dataclasses.replace(STACK, trl=None)},
        {"capability": "8.9"},
        {"capability": None},
        {"architecture": "another"},
        {"config": configure(seq_len=65).to_json()},
        {"config": configure(allocator="expandable_segments").to_json()},
    ],
    ids=["torch", "no trl", "capability", "no capability", "figures", "length", "allocator"],
)
def test_what_decides_an_entry_is_in_its_key(file: Path, changes: dict[str, Any]) -> None:
    with opened(file) as cache:
        cache.put(key(), VALUE, EVENTS)

        assert cache.get(key(**changes)) is None
        assert cache.events(key(**changes)) is None


def test_other_sources_do_not_find_an_entry(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    with opened(file) as cache:
        cache.put(key(), VALUE, EVENTS)
        monkeypatch.setattr(trace_cache, "_source", lambda: "another version")

        assert cache.get(key()) is None


@pytest.mark.parametrize(
    ("changed", "decides"),
    [
        ("probes/trace.py", True),
        ("models/allocator.py", True),
        ("probes/runner.py", False),
        ("models/throughput.py", False),
    ],
)
def test_the_digest_changes_with_the_sources_that_decide_a_trace(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changed: str, decides: bool
) -> None:
    root = Path(trace_cache.__file__).parents[1]
    for folder in ("probes", "models"):
        shutil.copytree(root / folder, tmp_path / folder)
    monkeypatch.setattr(trace_cache, "__file__", str(tmp_path / "advisor" / "trace_cache.py"))
    source = tmp_path / changed
    before = source.read_text("utf-8")
    digests = []
    for text in (before, before + "\n", before):
        source.write_text(text, "utf-8")
        digests.append(trace_cache._source.__wrapped__())

    assert digests[0] == digests[2]
    assert (digests[0] != digests[1]) == decides


def test_the_name_of_a_model_decides_nothing() -> None:
    assert key(config=configure(model="another").to_json()) == key()


def test_a_file_of_random_bytes_is_made_anew(file: Path) -> None:
    file.parent.mkdir()
    file.write_bytes(os.urandom(8192))

    with opened(file) as cache:
        cache.put(key(), VALUE, EVENTS)
        assert cache.get(key()) == VALUE
    with opened(file) as cache:
        assert cache.events(key()) == EVENTS


def test_a_file_damaged_in_its_middle_answers_rightly_or_not_at_all(file: Path) -> None:
    with opened(file) as cache:
        for number in range(200):
            cache.put(str(number), {**VALUE, "number": number}, EVENTS)
    whole = bytearray(file.read_bytes())
    whole[4096:-4096] = os.urandom(len(whole) - 8192)
    file.write_bytes(whole)

    with opened(file) as cache:
        for number in range(200):
            assert cache.get(str(number)) in (None, {**VALUE, "number": number})
            assert cache.events(str(number)) in (None, EVENTS)
        cache.put("new", VALUE)
        assert cache.get("new") in (None, VALUE)


def test_a_flipped_byte_in_a_row_is_not_trusted(file: Path) -> None:
    with opened(file) as cache:
        cache.put(key(), VALUE, EVENTS)
    rewrite(file, "UPDATE entries SET value = replace(value, '512', '513')")

    with opened(file) as cache:
        assert cache.get(key()) is None
        assert cache.events(key()) == EVENTS
        cache.put(key(), VALUE)
        assert cache.get(key()) == VALUE


def test_a_flipped_byte_in_the_events_is_not_trusted(file: Path) -> None:
    with opened(file) as cache:
        cache.put(key(), VALUE, EVENTS)
    rewrite(file, "UPDATE entries SET events = ?", bytes([1]) + EVENTS[1:])

    with opened(file) as cache:
        assert cache.events(key()) is None
        assert cache.get(key()) == VALUE


@pytest.mark.parametrize("place", ["no file", "a folder", "below a file"])
def test_a_cache_that_cannot_be_written_answers_without(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    paths = {"no file": None, "a folder": tmp_path, "below a file": tmp_path / "file" / "traces"}

    with opened(paths[place]) as cache:
        cache.put(key(), VALUE, EVENTS)

        assert cache.get(key()) is None
        assert cache.events(key()) is None
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_file_that_another_process_holds_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    with opened(file) as cache:
        cache.put(key(), VALUE, EVENTS)
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, timeout: connect(path, timeout=0.01))
    with contextlib.closing(connect(file)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with opened(file) as cache:
            assert cache.get(key()) in (None, VALUE)
        other.rollback()

    with opened(file) as cache:
        assert cache.get(key()) == VALUE


@pytest.mark.parametrize("version", [FORMAT - 1, FORMAT + 1])
def test_entries_of_another_format_are_dropped(file: Path, version: int) -> None:
    with opened(file) as cache:
        cache.put(key(), VALUE, EVENTS)
    rewrite(file, "ALTER TABLE entries RENAME COLUMN digest TO checked")
    rewrite(file, f"PRAGMA user_version = {version}")

    with opened(file) as cache:
        assert cache.get(key()) is None
        cache.put(key(), VALUE)
        assert cache.get(key()) == VALUE


def test_the_oldest_entries_go_first(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.setattr(trace_cache, "_ENTRIES", 3)
    with opened(file) as cache:
        for number in range(5):
            cache.put(str(number), VALUE)

    with opened(file) as cache:
        assert [n for n in range(5) if cache.get(str(n)) is not None] == [2, 3, 4]


def test_a_store_traces_once_for_all_processes(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    made = []

    def counted(*args: Any) -> Any:
        made.append(args)
        return trace_quietly(*args)

    monkeypatch.setattr(traces, "trace_quietly", counted)
    answers = []
    for cap_bytes in (1 << 40, 1 << 40, 1 << 39):
        with opened(file) as cache:
            store = TraceStore(tiny(num_hidden_layers=2), "9.0", cache)
            answers.append((store.memory(configure(), cap_bytes), store.work(configure())))

    # The third asks for another cap: what was traced is replayed.
    assert len(made) == 1
    assert answers[0] == answers[1] == answers[2]
