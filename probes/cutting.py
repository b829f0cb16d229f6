"""Rows of tokens cut to a sequence length: truncated, split or dropped, and all of it counted.

What is split: a text goes on in further rows of the full length. A conversation is parted behind
the last answer that ends within the length, so that the next piece begins with a question; where no
answer ends there, it is parted at the length. Nothing is repeated: a later piece knows nothing of
the system's turn or the turns before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from lora_advisor.probes.errors import UsageError
from lora_advisor.probes.layout import IGNORED, Encoded

#: What becomes of rows that are longer than a sequence.
LONG_ROWS = ("truncate", "split", "drop")

#: A row as the trainers take it: "input_ids" and "labels".
TokenRow = dict[str, list[int]]


@dataclass(frozen=True, kw_only=True)
class TokenisedData:
    """Rows ready for training, and what was lost on the way.

    Attributes:
        rows: Rows of at most `seq_len` tokens, each with at least one trained token.
        truncated: Rows that were cut and kept.
        dropped: Rows without a trained token (left).
        lengths: Tokens of every row of the file, before cutting.
        long_dropped: Rows left out because they were too long.
        split: Rows that became several.
        pieces: Rows that these became.
        pieces_dropped: Pieces without a trained token, left out.
        sources: For each of `rows`, the number of the row of the file it is of, from 0 on.
    """

    rows: tuple[TokenRow, ...] = field(repr=False)
    truncated: int
    dropped: int
    lengths: tuple[int, ...] = field(repr=False)
    long_dropped: int = 0
    split: int = 0
    pieces: int = 0
    pieces_dropped: int = 0
    sources: tuple[int, ...] = field(default=(), repr=False)


def check_long_rows(long_rows: str, stage: str = "sft") -> None:
    """Refuse a word that does not say what becomes of long rows, or not of these.

    Raises:
        UsageError: It is none of `LONG_ROWS`, or the rows are preference pairs and would be split
            or dropped.
    """
    if long_rows not in LONG_ROWS:
        raise UsageError(f"`long_rows` must be {', '.join(LONG_ROWS)}, but got {long_rows!r}.")
    if stage == "dpo" and long_rows != "truncate":
        raise UsageError(
            "`--long-rows` must be truncate with `--stage dpo`, whose pairs are only ever cut at "
            f"their end, but got {long_rows!r}; leave it out."
        )


def cut_rows(encoded: Sequence[Encoded], seq_len: int, long_rows: str) -> TokenisedData:
    """Return rows of at most `seq_len` tokens; there may be none.

    Args:
        encoded: The rows.
        seq_len: Tokens in a sequence.
        long_rows: One of `LONG_ROWS`.
    """
    check_long_rows(long_rows)
    rows: list[TokenRow] = []
    sources: list[int] = []
    counts = dict.fromkeys(
        ("truncated", "dropped", "long_dropped", "split", "pieces", "pieces_dropped"), 0
    )
    for number, row in enumerate(encoded):
        long = len(row.ids) > seq_len
        if long and long_rows == "drop":
            counts["long_dropped"] += 1
            continue
        split = long and long_rows == "split"
        parts = list(_pieces(row, seq_len)) if split else [(0, seq_len)]
        kept = [piece for piece in (_piece(row, *part) for part in parts) if _teaches(piece)]
        rows += kept
        sources += [number] * len(kept)
        counts["dropped"] += not kept
        if split:
            counts["pieces_dropped"] += len(parts) - len(kept)
            counts["split"] += bool(kept)
            counts["pieces"] += len(kept)
        elif kept:
            counts["truncated"] += long
    lengths = tuple(len(row.ids) for row in encoded)
    return TokenisedData(rows=tuple(rows), lengths=lengths, sources=tuple(sources), **counts)


def _pieces(row: Encoded, seq_len: int) -> Iterator[tuple[int, int]]:
    """Yield where each piece of a row begins and ends."""
    start = 0
    while len(row.ids) - start > seq_len:
        end = max((e for e in row.ends if start < e <= start + seq_len), default=start + seq_len)
        yield start, end
        start = end
    yield start, len(row.ids)


def _piece(row: Encoded, start: int, end: int) -> TokenRow:
    # The first token is predicted from nothing: models shift the labels by one.
    return {"input_ids": row.ids[start:end], "labels": [IGNORED, *row.labels[start + 1 : end]]}


def _teaches(row: TokenRow) -> bool:
    """Return whether a row has a trained token."""
    return any(label != IGNORED for label in row["labels"])
