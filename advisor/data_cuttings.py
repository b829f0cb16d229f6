"""What sequence lengths make of the rows of a data set: what they cut, and what they cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lora_advisor.advisor.lengths import epoch_of
from lora_advisor.probes.batching import BATCHINGS
from lora_advisor.probes.cutting import TokenisedData, cut_rows
from lora_advisor.probes.layout import Encoded

#: Sequence lengths that are set side by side, up to the first that holds every row.
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
#: Batches whose padding is told: `plan` holds 24 rows a step where it is not told otherwise, and
#: 4 at a time are in the midst of what small cards take.
MICRO_BATCH, ACCUMULATION = 4, 6


@dataclass(frozen=True, kw_only=True)
class Cutting:
    """What a sequence length makes of the rows.

    Attributes:
        seq_len: Tokens in a sequence.
        long_rows: Rows that are longer.
        rows: Rows that are trained on, pieces counted one by one.
        tokens: Their tokens.
        lost_tokens: Tokens of the rows that teach something which are not among them.
        computed_tokens: Tokens that go through the model in an epoch in random order, padding
            included; None where no row is left.
        padding: Share of the computed tokens that is padding, by the batching.
        truncated: Rows that were cut and kept.
        split: Rows that became several.
        pieces: Rows that these became.
        long_dropped: Rows left out because they were too long.
        untrained: Rows left out because nothing in them is trained.
        untrained_pieces: Pieces left out likewise.
    """

    seq_len: int
    long_rows: int
    rows: int
    tokens: int
    lost_tokens: int
    computed_tokens: int | None
    padding: Mapping[str, float]
    truncated: int
    split: int
    pieces: int
    long_dropped: int
    untrained: int
    untrained_pieces: int


def cuttings_of(
    encoded: Sequence[Encoded], also: Iterable[int], long_rows: str
) -> tuple[Cutting, ...]:
    """Return what each of `LENGTHS` makes of the rows, and what others do."""
    longest = max(len(row.ids) for row in encoded)
    enough = next((n for n in LENGTHS if n >= longest), LENGTHS[-1])
    wanted = sorted({*(n for n in LENGTHS if n <= enough), *also})
    whole = cut_rows(encoded, longest, "truncate")
    tokens = sum(len(row["input_ids"]) for row in whole.rows)
    return tuple(_cutting(cut_rows(encoded, n, long_rows), n, tokens) for n in wanted)


def _cutting(data: TokenisedData, seq_len: int, whole: int) -> Cutting:
    lengths = [len(row["input_ids"]) for row in data.rows]
    epochs = {
        name: epoch_of(
            lengths, name, seq_len=seq_len, micro_batch=MICRO_BATCH, accumulation=ACCUMULATION
        )
        for name in (BATCHINGS if lengths else ())
    }
    return Cutting(
        seq_len=seq_len,
        long_rows=sum(length > seq_len for length in data.lengths),
        rows=len(lengths),
        tokens=sum(lengths),
        lost_tokens=whole - sum(lengths),
        computed_tokens=epochs["random"].computed_tokens if epochs else None,
        padding={name: epoch.padding_share for name, epoch in epochs.items()},
        truncated=data.truncated,
        split=data.split,
        pieces=data.pieces,
        long_dropped=data.long_dropped,
        untrained=data.dropped,
        untrained_pieces=data.pieces_dropped,
    )
