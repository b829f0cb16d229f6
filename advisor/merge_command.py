"""The command `merge`: from its words to a full model and what is said of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_advisor.probes.errors import UsageError

if TYPE_CHECKING:
    from lora_advisor.advisor.merge import Merged
    from lora_advisor.advisor.merge_check import Difference

#: Types of the result.
DTYPES = ("bf16", "fp16", "fp32")


@click.command()
@click.argument("adapter", metavar="RUN_OR_ADAPTER", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), required=True,
              help="Folder of the full model, new or empty.")  # fmt: skip
@click.option("--dtype", default=None,
              help="bf16, fp16 or fp32 (default: the base's; bf16 for one in fp32).")  # fmt: skip
@click.option("--max-shard-size", default="2GB", show_default=True,
              help="Largest file of the result, and so most of the memory it takes.")  # fmt: skip
@click.option("--base", default=None,
              help="The base model, unquantised: folder or hub id (default: what the adapter "
              "names).")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def merge(adapter: Path, output: Path, **options: Any) -> int:
    """Merge an adapter into its base: a full model that needs no peft.

    Weights are read and written one by one, so that little memory is needed. An adapter trained on
    a 4-bit base is merged into the unquantised one. The result is read again and compared with base
    and adapter before it gets its name.

    \b
    Examples:
      lora-advisor merge runs/first --output merged
      lora-advisor merge runs/first/adapter --output merged --base ./my-model --dtype fp16
    """
    from transformers.utils import logging

    from lora_advisor.advisor.merge import merge as run_merge
    from lora_advisor.advisor.merge_plan import check_output, check_room, gb, plan_merge

    dtype = options["dtype"]
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"`--dtype` must be one of {', '.join(DTYPES)}, but got {dtype!r}.")
    check_output(output)
    quiet: Any = logging.disable_progress_bar  # transformers leaves it untyped
    quiet()
    planned = plan_merge(
        adapter, base=options["base"], dtype=dtype, shard_bytes=_shard_bytes(options)
    )
    memory, disk = check_room(planned, output)
    _say(
        f"needs {gb(planned.memory_bytes)} of memory and {gb(planned.disk_bytes)} of disk; "
        f"{gb(memory)} and {gb(disk)} are free"
    )
    merged = run_merge(planned, output, say=_say)
    if options["as_json"]:
        data = dataclasses.asdict(merged)
        click.echo(json.dumps({**data, "output": str(merged.output)}))
    else:
        click.echo(merged_text(merged))
    return 0


def merged_text(merged: Merged) -> str:
    """Write what a merge came to."""
    changed = (
        "by peft, in memory" if merged.changed is None else f"{merged.changed} weights changed"
    )
    lines = [
        f"full model in {merged.output}: {merged.dtype}, {changed}",
        f"against base and adapter: {_difference(merged.check)}",
        f"the adapter itself: {_difference(merged.effect)}",
    ]
    if merged.quantised is not None:
        lines.append(
            "against the adapter on the 4-bit base it was trained on, whose weights are not quite "
            f"these: {_difference(merged.quantised)}"
        )
    elif merged.quantised_unknown is not None:
        lines.append(
            "against the adapter on the 4-bit base it was trained on: unknown "
            f"({merged.quantised_unknown})"
        )
    return "\n".join(lines)


def _difference(difference: Difference) -> str:
    return (
        f"logits differ by {difference.relative:.2%} of their spread, {difference.largest:.3g} at "
        f"most; KL {difference.divergence:.2g} nats; same next token at {difference.agreement:.0%}"
    )


def _shard_bytes(options: dict[str, Any]) -> int:
    from huggingface_hub.serialization._base import parse_size_to_int

    given = options["max_shard_size"]
    try:
        size = int(parse_size_to_int(given))
    except ValueError:
        size = 0
    if size < 1:
        raise UsageError(
            f"`--max-shard-size` must be a size such as 500MB or 2GB, but got {given!r}."
        )
    return size


def _say(line: str) -> None:
    click.echo(line, err=True)
