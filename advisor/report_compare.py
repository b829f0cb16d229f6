"""Full fine-tuning, LoRA and QLoRA side by side, as text and as JSON."""

from __future__ import annotations

from typing import Any

from tabulate import tabulate

from lora_advisor.advisor.compare import STAGES, Column, Comparison
from lora_advisor.advisor.report import gib, interval_text, trainer_text
from lora_advisor.probes.machine import GIB
from lora_advisor.probes.plan import plain_json

_TITLES = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}
_MEANING = """\
stages: the most that live tensors take while each runs; the largest (*) is the peak
held: what PyTorch's caching allocator takes for that when nothing stops it
process: that with the CUDA context; at most: a one-sided bound on it
verdict: whether that fits the limit, as sure as the trace is
speed: padding included, with the range it lies in nine times of ten
All of it is traced: the step's allocations and kernels, replayed; a prediction, not measured."""


def compare_text(comparison: Comparison) -> str:
    """Write the methods side by side, a row a figure."""
    columns = comparison.columns
    config = columns[0].config
    where = comparison.machine.name
    if comparison.machine.kind == "card":
        where += " (not here: predicted)"
    title = (
        f"{config.model}, {config.micro_batch} x {config.seq_len} tokens x {config.accumulation}, "
        f"{config.precision}, {config.optimizer}, checkpointing {config.checkpointing}, "
        f"{trainer_text(config)}\n"
        f"on {where}, limit {gib(comparison.limit_bytes)}"
    )
    rows = [
        [
            ("optimizer step" if stage == "optimizer" else stage),
            *(_stage(c, stage) for c in columns),
        ]
        for stage in STAGES
    ]
    rows += [
        ["peak live", *(_size(c.prediction.memory.allocated_bytes) for c in columns)],
        ["held by the allocator", *(_size(c.prediction.memory.reserved_bytes) for c in columns)],
        ["process", *(_size(c.prediction.memory.process_bytes) for c in columns)],
        ["process, at most", *(_size(c.prediction.memory.process_upper_bytes) for c in columns)],
        ["verdict", *(c.prediction.verdict for c in columns)],
        ["trained parameters", *(f"{c.trainable:,}" for c in columns)],
        ["speed, tokens/s", *(_speed(c) for c in columns)],
    ]
    headers = ["GiB", *(_TITLES[c.method] for c in columns)]
    align = ("left", *("right" for _ in columns))
    table = tabulate(
        rows, headers=headers, tablefmt="simple", disable_numparse=True, colalign=align,
        preserve_whitespace=True,
    )  # fmt: skip
    return "\n".join([title, "", table, "", _MEANING])


def _size(size: int) -> str:
    return f"{size / GIB:.2f}  "


def _stage(column: Column, stage: str) -> str:
    size = column.prediction.memory.phases.get(stage, 0)
    return f"{size / GIB:.2f} {'*' if stage == column.peak_stage else ' '}"


def _speed(column: Column) -> str:
    return interval_text(column.prediction.tokens_per_s).replace(" tokens/s", "")


def compare_json(comparison: Comparison) -> dict[str, Any]:
    """Return the methods side by side as JSON, in bytes."""
    return {
        "machine": plain_json(comparison.machine),
        "limit_bytes": comparison.limit_bytes,
        "evidence": "traced",
        "methods": plain_json(comparison.columns),
    }
