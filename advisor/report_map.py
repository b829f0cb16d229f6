"""The map of what fits as a table for a terminal."""

from __future__ import annotations

import click

from lora_advisor.advisor.arms import describe
from lora_advisor.advisor.fitmap import FitMap
from lora_advisor.advisor.report import gib
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.machine import Machine

#: Characters in a line.
_WIDTH = 100
_SIGNS = {"fits": "+", "uncertain": "?", "does not fit": "."}
_COLOURS = {"fits": "green", "uncertain": "yellow", "does not fit": "red"}


def _shared(config: RunConfig) -> str:
    """Write what all sizes of a map share."""
    size = f"{config.micro_batch} x {config.seq_len} x {config.accumulation}, "
    repeated = f", accumulation {config.accumulation}" if config.accumulation > 1 else ""
    return f"{config.model}, {describe(config).replace(size, '')}{repeated}"


def map_title(drawn: FitMap, machine: Machine) -> str:
    """Write what a map shows: model, card, limit, and how it is known."""
    return (
        f"{_shared(drawn.config)}\non {machine.name}, limit {gib(drawn.limit_bytes)}; "
        "traced, not measured"
    )


def map_text(drawn: FitMap, machine: Machine, *, colour: bool = False) -> str:
    """Write the map: micro-batches down, sequence lengths across, as many as a line holds.

    Args:
        drawn: The map.
        machine: The card.
        colour: Whether the signs are coloured.
    """
    margin = max(len("micro-batch"), *(len(str(batch)) for batch in drawn.micro_batches))
    cell = max(len(str(length)) for length in drawn.seq_lens) + 2
    step = -(-len(drawn.seq_lens) // max(1, (_WIDTH - margin) // cell))
    asked = drawn.asked
    shown = drawn.seq_lens.index(asked.seq_len) if asked.seq_len in drawn.seq_lens else 0
    lengths = drawn.seq_lens[shown % step :: step]
    lines = [map_title(drawn, machine), ""]
    thinned = f" (1 in {step} of the {len(drawn.seq_lens)})" if step > 1 else ""
    lines.append(f"{'':{margin}}  sequence length in tokens{thinned}")
    lines.append(
        f"{'micro-batch':>{margin}}" + "".join(f"{n:>{cell - 1}} " for n in lengths).rstrip()
    )
    for batch in drawn.micro_batches:
        row = "".join(_sign(drawn, batch, length, cell, colour) for length in lengths)
        lines.append(f"{batch:>{margin}}{row}".rstrip())
    fits = sum(c.verdict == "fits" for c in drawn.cells)
    held = ("at least " if asked.at_least else "") + gib(asked.process_bytes)
    lines += [
        "",
        "+ fits   ? uncertain: only a run can tell   . does not fit   [ ] asked",
        f"{fits} of {len(drawn.cells)} sizes fit",
        f"asked: {asked.micro_batch} x {asked.seq_len}, {asked.verdict}; if free to, the process "
        f"would hold {held}",
    ]
    return "\n".join(lines)


def _sign(drawn: FitMap, batch: int, length: int, width: int, colour: bool) -> str:
    verdict = drawn.at(batch, length).verdict
    sign = click.style(_SIGNS[verdict], fg=_COLOURS[verdict]) if colour else _SIGNS[verdict]
    asked = (batch, length) == (drawn.asked.micro_batch, drawn.asked.seq_len)
    return " " * (width - 3) + (f"[{sign}]" if asked else f" {sign} ")
