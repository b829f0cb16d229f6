"""What this user has measured, and what others have, in two files: neither passes for the other.

Runs of this user stand in `probes.jsonl` of the cache, where `plan` writes them; imported ones in
`imported.jsonl` beside it. No plan takes an imported run for one of this machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_advisor.advisor.portable import BadLine, Line, portable, read_portable
from lora_advisor.probes.errors import MissingInputError, OutputError
from lora_advisor.probes.record import ProbeResult, append_lines, check_writable, read_records

OWN, IMPORTED = "probes.jsonl", "imported.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Merged:
    """What came of an import.

    Attributes:
        taken: Runs that were new.
        known: Runs that were there already, as imported or as measured here.
        bad: Lines that were not taken.
    """

    taken: int
    known: int
    bad: tuple[BadLine, ...]


def export_runs(sources: Sequence[Path], out: Path) -> tuple[int, int]:
    """Write the runs of some records to one file, each once; the file is whole or not there.

    Args:
        sources: Records.
        out: The file to write.

    Returns:
        How many runs were written, and how many were left out as repeats.

    Raises:
        MissingInputError: None of the records holds a run, or one is not there.
        OutputError: The file cannot be written.
    """
    check_writable(out)
    missing = [source for source in sources if not source.exists()]
    if missing:
        raise MissingInputError(
            f"`{missing[0]}` must be a record of runs, but it is not there; `plan` on a card or "
            "with --device cpu measures some."
        )
    lines = [portable(result) for source in sources for result in read_records(source)]
    if not lines:
        raise MissingInputError(f"`{sources[0]}` must hold a run, but it holds none.")
    unique = {line.hash: line.text for line in lines}
    part = out.with_name(out.name + ".part")
    try:
        part.write_text("".join(f"{text}\n" for text in unique.values()), "utf-8")
        part.replace(out)
    except OSError as error:
        raise OutputError(
            f"`{out}` must be a place that can be written, but {error.strerror}."
        ) from None
    return len(unique), len(lines) - len(unique)


def import_runs(file: Path, cache: Path) -> Merged:
    """Add the good lines of a file to the imported runs; what is bad is left out and told.

    Args:
        file: Lines of `records export`.
        cache: The user's cache folder.
    """
    good, bad = read_portable(file)
    store = cache / IMPORTED
    check_writable(store)
    known = {portable(result).hash for result in read_records(cache / OWN)} | _hashes(store)
    new = [line for line in good if line.hash not in known]
    if new:
        append_lines(store, "".join(f"{line.text}\n" for line in new))
    return Merged(taken=len(new), known=len(good) - len(new), bad=tuple(bad))


def own_runs(cache: Path) -> list[ProbeResult]:
    """Return what was measured by this user; a damaged line is an error."""
    return read_records(cache / OWN)


def imported_runs(cache: Path) -> list[ProbeResult]:
    """Return the imported runs."""
    return read_records(cache / IMPORTED)


def once(results: Iterable[ProbeResult]) -> list[Line]:
    """Return runs as they would be given away, each once."""
    return list({line.hash: line for line in map(portable, results)}.values())


def _hashes(store: Path) -> set[str]:
    """Return the hashes in the file of imported runs, those of newer programs too."""
    read_records(store)  # damage is said in its words
    if not store.exists():
        return set()
    lines = store.read_text("utf-8").splitlines()
    return {json.loads(line)["hash"] for line in lines if line.strip() and line.endswith("}")}
