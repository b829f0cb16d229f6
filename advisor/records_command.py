"""The commands `records export`, `import` and `stats`: runs to give away and to take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_advisor.probes.errors import DataError

if TYPE_CHECKING:
    from lora_advisor.advisor.record_stats import Group, Off

#: So many bad lines are named; of the others the number is told.
_NAMED = 10


@click.group("records")
def records_group() -> None:
    """Give away what was measured here, and take what others have measured.

    \b
    Examples:
      lora-advisor records export our-cards.jsonl
      lora-advisor records import their-cards.jsonl
      lora-advisor records stats
    """


@records_group.command("export")
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--record", "records", type=click.Path(path_type=Path), multiple=True,
              help="A record to take instead of the cache's, such as that of `plan --record` or "
              "runs.jsonl of a bench; may be given again.")  # fmt: skip
@click.option("--imported", is_flag=True, help="Also those that were imported.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def export_command(file: Path, records: Sequence[Path], imported: bool, as_json: bool) -> int:
    """Write the runs measured here to FILE, one a line, each once, with a hash.

    A line holds configuration, the model's figures, card, driver, kind of CPU, versions, and what
    was measured when. It does not hold paths, the names of models that are not bundled, or the
    words of errors; host and user names are never recorded.

    \b
    Examples:
      lora-advisor records export our-cards.jsonl
      lora-advisor records export bench.jsonl --record bench-mycard/runs.jsonl
    """
    from lora_advisor.advisor.asking import cache_dir
    from lora_advisor.advisor.record_store import IMPORTED, OWN, export_runs

    sources = list(records) or [cache_dir() / OWN]
    sources += [cache_dir() / IMPORTED] if imported else []
    written, repeats = export_runs(sources, file)
    if as_json:
        click.echo(json.dumps({"file": str(file), "written": written, "repeats": repeats}))
        return 0
    again = f", {repeats} repeats left out" if repeats else ""
    click.echo(f"{_runs(written)} written to {file}{again}")
    return 0


@records_group.command("import")
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def import_command(file: Path, as_json: bool) -> int:
    """Take the runs of FILE, written by `records export`, into this user's records.

    Every line's form and hash are checked. A bad line is named and left out (exit code 65), the
    others are taken. Imported runs stand in a file of their own and are never taken for runs of
    this machine; `plan --gpu CARD` predicts from those of that card, with the versions installed
    here, and says so.

    \b
    Example:
      lora-advisor records import their-cards.jsonl
    """
    from lora_advisor.advisor.asking import cache_dir
    from lora_advisor.advisor.record_store import import_runs

    merged = import_runs(file, cache_dir())
    taken = f"{_runs(merged.taken)} taken, {merged.known} known before"
    bad = [{"line": line.number, "reason": line.reason} for line in merged.bad]
    if as_json:
        click.echo(json.dumps({"taken": merged.taken, "known": merged.known, "bad": bad}))
        return DataError.exit_code if bad else 0
    if not bad:
        click.echo(taken)
        return 0
    for line in merged.bad[:_NAMED]:
        click.echo(f"line {line.number}: {line.reason}", err=True)
    raise DataError(
        f"`{file}` must hold lines of `records export`, but {len(bad)} are not such "
        f"({', '.join(str(line.number) for line in merged.bad[:_NAMED])}"
        f"{', ...' if len(bad) > _NAMED else ''}); of the others {taken}."
    )


@records_group.command("stats")
@click.option("--quick", is_flag=True, help="Do not predict the runs: no errors, no traces.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def stats_command(quick: bool, as_json: bool) -> int:
    """Show what the records hold: for each machine and model runs, endings, errors of the models.

    Errors are medians of the absolute error. "traced" ones use no figure of a run; "taught" is the
    speed of each half of the runs after learning from the other half. What is not in the cache is
    traced, which takes some seconds a run.

    \b
    Examples:
      lora-advisor records stats
      lora-advisor records stats --quick
    """
    from lora_advisor.advisor.asking import cache_dir, trace_cache
    from lora_advisor.advisor.record_stats import groups_of
    from lora_advisor.advisor.record_store import imported_runs, own_runs
    from lora_advisor.probes.plan import plain_json

    groups = groups_of(
        own_runs(cache_dir()),
        imported_runs(cache_dir()),
        errors=not quick,
        cache=trace_cache(),
        say=lambda line: click.echo(line, err=True),
    )
    if as_json:
        click.echo(json.dumps({"groups": plain_json(groups)}))
        return 0
    click.echo(stats_text(groups, errors=not quick))
    return 0


def stats_text(groups: Sequence[Group], *, errors: bool) -> str:
    """Write the groups as a table; unknown is said."""
    from tabulate import tabulate

    if not groups:
        return "no runs: `plan` measures some, `records import FILE` takes those of others"
    header = ["machine", "model", "runs", "endings"]
    header += ["allocator", "process", "speed", "taught"] if errors else []
    rows = []
    for group in groups:
        endings = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in group.outcomes)
        shared = f" ({group.imported} imported)" if group.imported else ""
        row = [f"{group.machine.name}, torch {group.stack.torch}", group.model,
               f"{group.runs}{shared}", endings]  # fmt: skip
        if errors:
            offs = (group.allocator, group.process, group.speed, group.taught_speed)
            row += [_percent(off) for off in offs]
        rows.append(row)
    text = tabulate(rows, headers=header, tablefmt="simple", disable_numparse=True)
    return "\n".join([text, *_notes(groups)]) if errors else text


def _notes(groups: Sequence[Group]) -> list[str]:
    left = sum(group.not_predicted for group in groups)
    doubtful = sum(group.doubtful for group in groups)
    notes = [
        f"{_runs(left)} not predicted: compiled, of another engine, or not to be traced here"
        if left
        else "",
        f"{_runs(doubtful)} with a time that cannot be trusted: not counted in speeds"
        if doubtful
        else "",
        "some ran with other versions than are installed here, with which they are predicted"
        if not all(group.same_stack for group in groups)
        else "",
    ]
    return ["", *filter(None, notes)] if any(notes) else []


def _percent(off: Off | None) -> str:
    return "unknown" if off is None else f"{100 * off.median:.1f} % of {off.runs}"


def _runs(count: int) -> str:
    return f"{count} run" if count == 1 else f"{count} runs"
