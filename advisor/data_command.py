"""The command `data`: what is in a data set, before anything is trained on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from lora_advisor.advisor.options import long_rows_option


@click.group("data")
def data_group() -> None:
    """Look at training data before training: lengths, repeats, and what the model will see.

    \b
    Example:
      lora-advisor data inspect chat.jsonl --model ./my-model
    """


@data_group.command("inspect")
@click.argument("path", metavar="PATH", type=click.Path(path_type=Path))
@click.option(
    "--model",
    default="qwen2.5-1.5b",
    show_default=True,
    help="Folder or hub id with a tokenizer; with a bundled name lengths are in characters.",
)
@click.option(
    "--seq",
    type=int,
    default=None,
    help="Tokens in a sequence (default: what covers 99 % of the rows, as `plan --data` does).",
)
@click.option("--samples", type=int, default=3, show_default=True, help="Rows to show.")
@long_rows_option("truncate", default="truncate")
@click.option(
    "--trust-remote-code", is_flag=True, help="Run code that comes with the model (default: never)."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def inspect_command(path: Path, **options: Any) -> int:
    """Show what a data set holds, and what a longer or shorter sequence would cut and cost.

    PATH is a file (.jsonl, .json, .csv, .tsv, .parquet, .txt, .md; .gz behind it, but for parquet),
    a folder of files of one kind, or a data set on the hub: hub:owner/name, hub:owner/name:config,
    hub:owner/name:config:split (the split is "train" where none is given).

    \b
    Examples:
      lora-advisor data inspect chat.jsonl --model ./my-model
      lora-advisor data inspect books.txt --model ./my-model --seq 1024 --long-rows split
      lora-advisor data inspect hub:openai/gsm8k:main --model Qwen/Qwen2.5-1.5B
    """
    from lora_advisor.advisor.asking import architecture_of
    from lora_advisor.advisor.colours import has_colours
    from lora_advisor.advisor.data_inspect import inspect
    from lora_advisor.advisor.data_text import inspect_text

    report = inspect(
        path,
        architecture_of(options["model"], options),
        seq_len=options["seq"],
        long_rows=options["long_rows"],
        samples=options["samples"],
        say=lambda line: click.echo(line, err=True),
    )
    if options["as_json"]:
        click.echo(json.dumps(report.to_json()))
        return 0
    colours = has_colours()
    # click looks at the stream alone; who asked for no colours gets brackets instead.
    click.echo(inspect_text(report, colours=colours), color=colours)
    return 0
