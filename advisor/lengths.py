"""What one pass over rows of given lengths comes to, as the trainers make micro-batches of them.

Both trainers pad a micro-batch to its longest row and on to a multiple (`padding_multiple` of
probes/arguments.py), not to the sequence length (`Collator` of probes/collator.py,
DataCollatorForLanguageModeling of TRL), unless layers are compiled. TRL lays the packed rows of a
micro-batch end to end, and all of them are filled up to a multiple if anything is
(probes/packed_rows.py). A pair is two sequences, and all of a micro-batch
are padded to its longest one (DataCollatorForPreference of TRL).
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_advisor.probes.batching import grouped_sampler, random_order

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Seconds of one micro-batch of so many rows, each of so many tokens.
MicroTime = Callable[[int, int], float]

#: Lengths that are priced at most, and how far one is above the one before where so many suffice.
_KNOTS, _APART = 12, 1.3
#: Micro-batches shorter than this share of the longest are priced as if they had it.
_SHORTEST = 1 / 16
#: TRL packs with datasets' map, which hands over so many rows at a time (its `batch_size`).
_PACKED_AT_ONCE = 1000


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """The micro-batches of one pass over the rows.

    Attributes:
        batching: How they were made: one of `BATCHINGS`.
        micro_batch: Rows in a micro-batch; the last one may have fewer.
        accumulation: Micro-batches in an optimizer step; the last step may have fewer.
        useful_tokens: Tokens of the rows.
        histogram: Tokens that a micro-batch computes, padding included, and how many micro-batches
            do so, fewest first.
        rows: Rows that the micro-batches are made of; packed ones are fewer.
        sequences: Sequences that a row makes: 2 for a pair.
    """

    batching: str
    micro_batch: int
    accumulation: int
    useful_tokens: int
    histogram: tuple[tuple[int, int], ...]
    rows: int
    sequences: int = 1

    @property
    def micro_batches(self) -> int:
        """Micro-batches of the pass."""
        return sum(count for _, count in self.histogram)

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of the pass."""
        return math.ceil(self.micro_batches / self.accumulation)

    @property
    def computed_tokens(self) -> int:
        """Tokens that go through the model, padding included."""
        return sum(tokens * count for tokens, count in self.histogram)

    @property
    def padding_share(self) -> float:
        """Share of the computed tokens that is padding."""
        return 1 - self.useful_tokens / self.computed_tokens

    @property
    def lengths(self) -> tuple[float, ...]:
        """Tokens a sequence of each entry of `histogram`, spread over a whole micro-batch."""
        return tuple(tokens / self.micro_batch / self.sequences for tokens, _ in self.histogram)

    def epoch_s(self, step_time_of: MicroTime, priced: Sequence[int] | None = None) -> float:
        """Return the seconds of the pass; `useful_tokens` over them is its useful speed.

        Args:
            step_time_of: Prices a micro-batch; asked for a few lengths, between which the time is
                taken to be linear.
            priced: These lengths; None for those of `priced_lengths`.
        """
        import numpy

        priced = priced_lengths(self.lengths) if priced is None else priced
        seconds = [step_time_of(self.micro_batch, length) for length in priced]
        counts = [count for _, count in self.histogram]
        return float(numpy.dot(numpy.interp(self.lengths, priced, seconds), counts))


def epoch_of(
    lengths: Sequence[int],
    batching: str,
    *,
    seq_len: int,
    micro_batch: int,
    accumulation: int = 1,
    seed: int = 0,
    sequences: int = 1,
    useful_tokens: int | None = None,
    multiple: int = 1,
) -> Epoch:
    """Return the first pass over rows of these lengths.

    Args:
        lengths: Tokens of each row (of a pair: of its longer sequence), at least one row, in the
            order of the data.
        batching: One of `BATCHINGS`.
        seq_len: Tokens that a row is cut to.
        micro_batch: Rows in a micro-batch.
        accumulation: Micro-batches in an optimizer step.
        seed: Of the order, as in `Schedule`.
        sequences: Sequences that a row makes: 2 for a pair.
        useful_tokens: Tokens of the rows; None for the sum of their lengths.
        multiple: What a micro-batch's length is padded to a multiple of; that of packed rows is the
            length of all.
    """
    import numpy

    rows = [min(length, seq_len) for length in lengths]
    useful = sum(rows) * sequences if useful_tokens is None else useful_tokens
    if batching == "grouped":
        order = list(grouped_sampler(rows, micro_batch * accumulation, seed=seed))
    else:
        if batching == "packed":
            rows = [sum(documents) for documents in pack(rows, seq_len)]
        order = random_order(len(rows), seed=seed)
    tokens = _computed(
        numpy.array(rows)[order], micro_batch, multiple, end_to_end=batching == "packed"
    )
    tokens *= sequences
    values, counts = numpy.unique(tokens, return_counts=True)
    return Epoch(
        batching=batching,
        micro_batch=micro_batch,
        accumulation=accumulation,
        useful_tokens=useful,
        histogram=tuple(zip(values.tolist(), counts.tolist(), strict=True)),
        rows=len(rows),
        sequences=sequences,
    )


def _computed(
    rows: NDArray[Any], micro_batch: int, multiple: int, *, end_to_end: bool
) -> NDArray[Any]:
    """Return the tokens of each micro-batch of rows in the order they are taken.

    Each is padded to its longest row, and that to a multiple; rows that lie end to end are filled
    up together.
    """
    import numpy

    starts = numpy.arange(0, len(rows), micro_batch)
    if end_to_end:
        return -(-numpy.add.reduceat(rows, starts) // multiple) * multiple
    counts = numpy.minimum(micro_batch, len(rows) - starts)
    longest = numpy.maximum.reduceat(rows, starts)
    return -(-longest // multiple) * multiple * counts


def pack(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Return the lengths that share each packed row, as TRL's strategy "bfd" puts them together."""
    packed: list[list[int]] = []
    for start in range(0, len(lengths), _PACKED_AT_ONCE):
        packed += _best_fit(lengths[start : start + _PACKED_AT_ONCE], seq_len)
    return packed


def _best_fit(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Put each length, longest first, where the least is left; rows in the order they began."""
    packed: list[list[int]] = []
    spaces: list[int] = []  # ascending, each once
    rows_with: dict[int, deque[list[int]]] = defaultdict(deque)
    for length in sorted(lengths, reverse=True):
        at = bisect_left(spaces, length)
        if at == len(spaces):
            space = seq_len
            packed.append([])
            row = packed[-1]
        else:
            space = spaces[at]
            row = rows_with[space].popleft()
            if not rows_with[space]:
                del spaces[at]
        row.append(length)
        left = space - length
        if left > 0:
            if not rows_with[left]:
                insort(spaces, left)
            rows_with[left].append(row)
    return packed


def priced_lengths(lengths: Iterable[float]) -> tuple[int, ...]:
    """Return the few lengths that are priced for these, evenly apart in ratio."""
    import numpy

    lengths = list(lengths)
    highest = math.ceil(max(lengths))
    lowest = max(2, math.floor(max(min(lengths), highest * _SHORTEST)))
    if lowest >= highest:
        return (highest,)
    count = min(_KNOTS, 1 + math.ceil(math.log(highest / lowest) / math.log(_APART)))
    spread = numpy.rint(numpy.geomspace(lowest, highest, count)).astype(int)
    return tuple(numpy.unique(spread).tolist())


def length_counts(lengths: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Return how many rows have each length, shortest first."""
    counts: dict[int, int] = {}
    for length in lengths:
        counts[length] = counts.get(length, 0) + 1
    return tuple(sorted(counts.items()))


def lengths_of(counts: Iterable[tuple[int, int]], *, seed: int = 0) -> list[int]:
    """Return lengths that occur so often, in random order: that of the file is not kept."""
    import numpy

    table = numpy.array(list(counts))
    lengths = numpy.repeat(table[:, 0], table[:, 1])
    shuffled: list[int] = numpy.random.default_rng(seed).permutation(lengths).tolist()
    return shuffled
