"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from lora_advisor.advisor.knobs import KNOBS, LONG_ROWS

F = TypeVar("F", bound=Callable[..., Any])


def model_options(*, model: str = "qwen2.5-1.5b") -> Callable[[F], F]:
    """Return what adds the options that say which model, which memory and which adapter."""
    option = click.option
    every = [
        option("--model", default=model, show_default=True,
               help="Bundled name, folder, path of a config.json, or hub id."),
        option("--vram", type=float, default=None,
               help="GiB to plan for (default: the card's memory; on a CPU 80 % of RAM)."),
        option("--reserve", type=float, default=0.25, show_default=True,
               help="GiB of it to leave free, for the desktop and the unforeseen."),
        option("--gpu", default=None,
               help="A card that is not here, such as rtx-4060: predict for it."),
        option("--device", default="auto", show_default=True,
               help="auto, cuda, cpu, or none to predict only."),
        option("--trust-remote-code", is_flag=True,
               help="Run code that comes with the model (default: never)."),
        option("--rank", type=int, default=16, show_default=True,
               help="Rank of the adapter."),
        option("--alpha", type=float, default=None,
               help="Scale of the adapter (default: 2 x rank)."),
        option("--dropout", type=float, default=0.0, show_default=True,
               help="Dropout of the adapter."),
        option("--targets", default="all-linear", show_default=True,
               help="Modules that carry an adapter: all-linear, or names with commas."),
        option("--json", "as_json", is_flag=True, help="One JSON document on stdout."),
    ]  # fmt: skip
    return lambda command: _all(command, every)


def knob_options(*left_out: str, micro_batch: int | None = None) -> Callable[[F], F]:
    """Return what adds the options that fix a knob, some left out.

    Args:
        left_out: Knobs without an option.
        micro_batch: Sequences in one forward pass where none are given.
    """
    every = [
        click.option(
            "--packing", is_flag=True, default=None, help="Let short rows share a sequence."
        ),
        click.option(
            "--group-by-length",
            is_flag=True,
            default=None,
            help="Let rows of like length share a micro-batch.",
        ),
        click.option(
            "--micro-batch",
            type=int,
            default=micro_batch,
            show_default=micro_batch is not None,
            help="Fix the sequences in one forward pass.",
        ),
        *(
            click.option(f"--{name.replace('_', '-')}", default=None, help=f"Fix it: {words}.")
            for name, words in KNOBS.items()
            if name not in left_out
        ),
    ]
    return lambda command: _all(command, every)


def long_rows_option(said: str, *, default: str | None) -> Callable[[F], F]:
    """Return what adds the option that says what becomes of long rows.

    Args:
        said: How the default is told.
        default: What it is; None where it is somebody else's.
    """
    return click.option(
        "--long-rows",
        type=click.Choice(LONG_ROWS),
        default=default,
        help=f"What becomes of rows that are longer than a sequence (default: {said}).",
    )


def accumulation_option(command: F) -> F:
    """Add the option that says how many micro-batches make a step."""
    return click.option(
        "--accumulation", type=int, default=1, show_default=True, help="Micro-batches in a step."
    )(command)


def map_options(command: F) -> F:
    """Add the options of `fit` that ask for a map of sizes."""
    path = click.Path(path_type=Path)
    every = [
        click.option("--map", "map_", is_flag=True,
                     help="Say which micro-batches and sequence lengths fit, in one table."),
        click.option("--map-file", type=path, default=None,
                     help="Draw that map as a picture into this PNG file."),
        click.option("--micro-batches", default=None,
                     help="Rows of the map, such as 1,2,4 (default: 20 from 1 to 48)."),
        click.option("--seqs", default=None,
                     help="Columns of the map, such as 256,512 (default: 256 to 6400 in 25 steps, "
                          "as far as the model goes)."),
    ]  # fmt: skip
    return _all(command, every)


def _all(command: F, options: Sequence[Callable[[F], F]]) -> F:
    for add in reversed(options):
        command = add(command)
    return command
