"""Which micro-batches and sequence lengths fit: memory and verdict of a whole grid of sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_advisor.advisor.largest import longest_sequence
from lora_advisor.advisor.predictor import Predictor
from lora_advisor.advisor.trace_cache import key_of
from lora_advisor.models.traced import TracedMemory
from lora_advisor.probes.architectures import Architecture
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import UsageError
from lora_advisor.probes.machine import detect_stack
from lora_advisor.probes.record import check_writable

MICRO_BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 18, 20, 24, 28, 32, 36, 40, 48)
SEQ_LENS = tuple(range(256, 6401, 256))
#: Larger sizes are taken for slips of the finger; so are more sizes on one axis.
_MOST = {"--micro-batches": 4096, "--seqs": 1_048_576}
_MOST_VALUES = 200
#: Raised when what is kept of a map takes another form.
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One size of the map.

    Attributes:
        micro_batch: Sequences in one forward pass.
        seq_len: Tokens in a sequence.
        process_bytes: What the process would hold if free to.
        at_least: Whether that is a lower bound, which sufficed to see that it does not fit.
        verdict: "fits", "does not fit" or "uncertain".
    """

    micro_batch: int
    seq_len: int
    process_bytes: int
    at_least: bool
    verdict: str


@dataclass(frozen=True, kw_only=True)
class FitMap:
    """What fits, by micro-batch and sequence length.

    Attributes:
        config: What was asked; all cells share it but for the size.
        asked: The cell of the asked size, on the grid or not.
        micro_batches: Rows, ascending.
        seq_lens: Columns, ascending.
        limit_bytes: What the process may hold.
        cells: Row by row.
        evidence: How the figures are known.
    """

    config: RunConfig
    asked: Cell
    micro_batches: tuple[int, ...]
    seq_lens: tuple[int, ...]
    limit_bytes: int
    cells: tuple[Cell, ...]
    evidence: str = "traced"

    def at(self, micro_batch: int, seq_len: int) -> Cell:
        """Return the cell of a size on the grid."""
        row, column = self.micro_batches.index(micro_batch), self.seq_lens.index(seq_len)
        return self.cells[row * len(self.seq_lens) + column]


def sizes_of(name: str, words: str | None, least: int) -> tuple[int, ...] | None:
    """Read an axis such as "1,2,4"; None where none was given.

    Raises:
        UsageError: It holds what is no size.
    """
    if words is None:
        return None
    most = _MOST[name]
    try:
        values = sorted({int(word) for word in words.split(",")})
    except ValueError:
        values = [0]
    if values[0] < least or values[-1] > most:
        raise UsageError(
            f"`{name}` must be whole numbers from {least} to {most} with commas between, such as "
            f"256,512, but got {words!r}."
        )
    if len(values) > _MOST_VALUES:
        raise UsageError(f"`{name}` must name at most {_MOST_VALUES} sizes, but got {len(values)}.")
    return tuple(values)


def default_seq_lens(architecture: Architecture) -> tuple[int, ...]:
    """Return the columns where none are named, none longer than the model is made for."""
    most = longest_sequence(architecture)
    lengths = tuple(n for n in SEQ_LENS if most is None or n <= most)
    return lengths or (most or SEQ_LENS[0],)


def check_map_file(path: Path) -> None:
    """Refuse a picture that cannot be written, before the work.

    Raises:
        UsageError: It is no PNG.
        OutputError: The place cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise UsageError(f"`--map-file` must end in .png, but got {str(path)!r}.")
    check_writable(path)


def fit_map(
    config: RunConfig,
    predictor: Predictor,
    *,
    micro_batches: Sequence[int],
    seq_lens: Sequence[int],
) -> FitMap:
    """Return the verdict of every size of a grid, and of the asked one."""
    grid = [(batch, length) for batch in micro_batches for length in seq_lens]
    asked = (config.micro_batch, config.seq_len)
    sizes = [*grid, *([] if asked in grid else [asked])]
    traced = _traced(config, predictor, sizes)
    cells = {
        size: _cell(config.replace(micro_batch=size[0], seq_len=size[1]), memory, predictor)
        for size, memory in traced.items()
    }
    return FitMap(
        config=config,
        asked=cells[asked],
        micro_batches=tuple(micro_batches),
        seq_lens=tuple(seq_lens),
        limit_bytes=predictor.limit_bytes,
        cells=tuple(cells[size] for size in grid),
    )


def _cell(config: RunConfig, traced: TracedMemory, predictor: Predictor) -> Cell:
    memory = predictor.memory.predict(traced, config)
    return Cell(
        micro_batch=config.micro_batch,
        seq_len=config.seq_len,
        process_bytes=memory.process_bytes,
        at_least=traced.least,
        verdict=predictor.memory.verdict(config, memory, predictor.limit_bytes),
    )


def _traced(
    config: RunConfig, predictor: Predictor, sizes: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], TracedMemory]:
    """Return what the traces come to, from the disk where this map was drawn before."""
    store = predictor.store
    cap = predictor.limit_bytes - predictor.memory.context.value_bytes
    key = key_of(
        detect_stack(),
        store.capability,
        store.architecture.fingerprint,
        {**config.to_json(), "map": _VERSION, "cap_bytes": cap, "sizes": list(sizes)},
    )
    kept: dict[str, Any] | None = store.cache.get(key)
    if kept is None:
        from lora_advisor.advisor.sizes import SizeMap

        answers = SizeMap(store, config, cap).memory(sizes)
        kept = {"memory": [dataclasses.asdict(answers[size]) for size in sizes]}
        store.cache.put(key, kept)
    return {
        size: TracedMemory(**memory) for size, memory in zip(sizes, kept["memory"], strict=True)
    }
