"""The command `report`: from a plan or a training to a page, a picture and Markdown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_advisor.probes.errors import OutputError, UsageError

if TYPE_CHECKING:
    from lora_advisor.advisor.fitmap import FitMap
    from lora_advisor.advisor.page_source import Source


@click.command()
@click.argument("source", metavar="PLAN_OR_RUN", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=None,
              help="The page (default: PLAN with the ending .html, or report.html in the folder "
              "RUN).")  # fmt: skip
@click.option("--png", type=click.Path(path_type=Path), default=None,
              help="A still picture of the key charts too.")  # fmt: skip
@click.option("--markdown", type=click.Path(path_type=Path), default=None,
              help="The answer and the tables as Markdown too, for a pull request.")  # fmt: skip
@click.option("--record", type=click.Path(path_type=Path), default=None,
              help="The record of the plan's probes: what was expected of them is computed again, "
              "for a plan that does not hold it.")  # fmt: skip
@click.option("--no-map", is_flag=True, help="Leave out the map of what fits, which is traced: a "
              "minute where it is not cached.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def report(source: Path, **options: Any) -> int:
    """Write a plan or a training as one page of HTML that needs nothing else, and no network.

    A training that has not ended is shown as far as it is.

    \b
    Examples:
      lora-advisor report plan.json
      lora-advisor report runs/first --out first.html --png first.png --markdown first.md
    """
    from lora_advisor.advisor.page_source import read_source

    read = read_source(source)
    default = source / "report.html" if source.is_dir() else source.with_suffix(".html")
    places = {"page": options["out"] or default, "picture": options["png"],
              "Markdown": options["markdown"]}  # fmt: skip
    _check(places)
    read = _with_record(read, options["record"])
    drawn, why = _map(read, left_out=options["no_map"])
    written = _write(read, drawn, why, places)
    if options["as_json"]:
        click.echo(json.dumps({"files": {name: str(path) for name, path in written.items()}}))
        return 0
    for name, path in written.items():
        click.echo(f"{name} in {path} ({path.stat().st_size / 1000:,.0f} kB)")
    return 0


def _check(places: dict[str, Path | None]) -> None:
    """Refuse what cannot be written, before the work."""
    from lora_advisor.probes.record import check_writable

    picture = places["picture"]
    if picture is not None and picture.suffix.lower() != ".png":
        raise UsageError(f"`--png` must end in .png, but got {str(picture)!r}.")
    for path in places.values():
        if path is not None:
            check_writable(path)


def _with_record(read: Source, record: Path | None) -> Source:
    """Return the source with what is computed again from a record of probes."""
    if record is None:
        return read
    from lora_advisor.advisor.asking import trace_cache
    from lora_advisor.advisor.page_predictor import predictor_of, trail_from_record
    from lora_advisor.probes.errors import MissingInputError
    from lora_advisor.probes.record import read_records

    if read.plan is None:
        raise UsageError("`--record` must be left out for a training without a plan.")
    if not record.exists():
        raise MissingInputError(f"`{record}` must be a record of probes, but it is not there.")
    _say("computing again what was expected of each probe")
    predictor = predictor_of(read.plan, trace_cache())
    try:
        trail = trail_from_record(read.plan, read_records(record), predictor)
    finally:
        predictor.store.close()
    if not trail:
        raise UsageError(
            f"`{record}` must hold probes of the plan's machine, stack and model, but holds none."
        )
    return replace(read, trail=trail, recomputed=True)


def _map(read: Source, *, left_out: bool) -> tuple[FitMap | None, str | None]:
    """Return which sizes fit, or why that is not shown."""
    if read.plan is None:
        return None, None
    if left_out:
        return None, "The map was left out (--no-map)."
    from lora_advisor.advisor.asking import trace_cache
    from lora_advisor.advisor.page_predictor import map_of, predictor_of

    _say("tracing which sizes fit; --no-map leaves that out")
    predictor = predictor_of(read.plan, trace_cache())
    try:
        return map_of(read.plan, predictor)
    finally:
        predictor.store.close()


def _write(
    read: Source, drawn: FitMap | None, why: str | None, places: dict[str, Path | None]
) -> dict[str, Path]:
    from lora_advisor.advisor.page import page
    from lora_advisor.advisor.page_markdown import report_markdown

    written = {}
    for name, path in places.items():
        if path is None:
            continue
        if name == "picture":
            from lora_advisor.advisor.page_picture import draw_report

            draw_report(read, drawn, path)
        else:
            words = (
                page(read, drawn, no_map=why) if name == "page" else report_markdown(read, drawn)
            )
            _write_text(path, words)
        written[name] = path
    return written


def _write_text(path: Path, words: str) -> None:
    """Write a file; it is whole or not there."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(words, "utf-8")
        part.replace(path)
    except OSError as error:
        raise OutputError(
            f"`{path}` must be a place that can be written, but {error.strerror}."
        ) from None


def _say(line: str) -> None:
    click.echo(line, err=True)
