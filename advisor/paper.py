"""The table that `bench` stands beside: three published runs, and the way from one to the next.

From one row to the next the paper changes up to three factors at once. The way between two rows is
walked here one factor at a time, with the bench's own runs, so that each factor shows its share.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from lora_advisor.advisor.bench_design import size_of, size_text
from lora_advisor.advisor.cell_means import CellMeans, Levels
from lora_advisor.advisor.effects import Estimate

SOURCE = "arXiv 2509.12229, Profiling LoRA/QLoRA Fine-Tuning Efficiency on Consumer GPUs (2025)"
CARD = "NVIDIA GeForce RTX 4060, 8 GB"
MODEL = "Qwen2.5-1.5B-Instruct"
#: The same in this project's words; checkpointing was on.
CARD_KEY, BUNDLED, CHECKPOINTING = "rtx-4060", "qwen2.5-1.5b", "full"
#: What the paper, as far as it could be read (its table, from quotations), does not say.
UNKNOWN = (
    "whether the base was in 4 bits in each run", "rank, alpha and targets of the adapter",
    "gradient accumulation", "data", "versions of driver, torch, transformers, peft, bitsandbytes",
    "which tool read the memory, and what of it", "repeats",
)  # fmt: skip
NOTE = "One quotation gives run 2 a length of 1024; two others give 2048, which is taken."


@dataclass(frozen=True, kw_only=True)
class PaperRun:
    """One row of the paper's table.

    Attributes:
        name: Its number.
        optimizer: As a level of the factor; the paper writes AdamW and PagedAdamW (8-bit).
        precision: As a level.
        micro_batch: Sequences.
        seq_len: Tokens.
        tokens_per_s: As printed.
        memory_mb: Peak, as printed; MB of 10^6 or 2^20 bytes is not said.
        joules_per_token: As printed.
    """

    name: str
    optimizer: str
    precision: str
    micro_batch: int
    seq_len: int
    tokens_per_s: float
    memory_mb: float
    joules_per_token: float

    @property
    def watts(self) -> float:
        """Power that energy and speed come to."""
        return self.joules_per_token * self.tokens_per_s

    @property
    def levels(self) -> Levels:
        """Its cell in the bench, the method left out."""
        return (self.optimizer, self.precision, size_text(self.micro_batch, self.seq_len))


RUNS = (
    PaperRun(name="1", optimizer="adamw_torch", precision="fp16", micro_batch=1, seq_len=512,
             tokens_per_s=500.3, memory_mb=6234, joules_per_token=0.19),
    PaperRun(name="2", optimizer="paged_adamw_8bit", precision="fp16", micro_batch=2, seq_len=2048,
             tokens_per_s=628.1, memory_mb=8062, joules_per_token=0.15),
    PaperRun(name="3", optimizer="paged_adamw_8bit", precision="bf16", micro_batch=2, seq_len=1024,
             tokens_per_s=360.2, memory_mb=7949, joules_per_token=0.26),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Step:
    """One change on the way between two rows, everything else equal.

    Attributes:
        changed: What changes, in words.
        ratio: Of tokens/s here, by method; None where a side did not run.
    """

    changed: str
    ratio: Mapping[str, Estimate | None]


@dataclass(frozen=True, kw_only=True)
class Way:
    """From one row to the next.

    Attributes:
        start: The one.
        end: The other.
        paper_ratio: Of tokens/s in the paper, all changes at once.
        ratio: The same here, by method.
        steps: The changes one at a time, in this order.
    """

    start: PaperRun
    end: PaperRun
    paper_ratio: float
    ratio: Mapping[str, Estimate | None]
    steps: tuple[Step, ...]


def ways(means: CellMeans, methods: Sequence[str]) -> list[Way]:
    """Return the ways between the paper's rows as they are walked here.

    Args:
        means: What the bench's configurations reach, their levels in the order of FACTORS.
        methods: The methods to walk them with.
    """
    ran = {levels[1:] for levels in means.cells}

    def ratio(start: Levels, end: Levels) -> dict[str, Estimate | None]:
        return {m: means.ratio((m, *start), (m, *end)) for m in methods}

    return [
        Way(
            start=start,
            end=end,
            paper_ratio=end.tokens_per_s / start.tokens_per_s,
            ratio=ratio(start.levels, end.levels),
            steps=tuple(
                Step(changed=name, ratio=ratio(old, new))
                for name, old, new in _walk(start.levels, end.levels, ran)
            ),
        )
        for start, end in itertools.pairwise(RUNS)
    ]


def _walk(start: Levels, end: Levels, ran: Collection[Levels]) -> list[tuple[str, Levels, Levels]]:
    """Return the changes from one cell to another, one at a time, each with its two cells.

    A change that leads to a cell that never ran is made together with the next.
    """
    optimizer, precision, size = end
    (old_batch, old_len), (batch, length) = size_of(start[2]), size_of(size)
    stations = [
        (f"optimizer {start[0]} to {optimizer}", (optimizer, *start[1:])),
        (f"precision {start[1]} to {precision}", (optimizer, precision, start[2])),
        (f"micro-batch {old_batch} to {batch}", (optimizer, precision, size_text(batch, old_len))),
        (f"length {old_len} to {length}", end),
    ]
    steps, names, here = [], [], start
    last = here
    for name, station in stations:
        if station == last:
            continue
        names.append(name)
        last = station
        if station in ran or station == end:
            steps.append((" and ".join(names), here, station))
            names, here = [], station
    return steps
