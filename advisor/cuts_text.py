"""What became of rows that are longer than a sequence, as text: in plans, reports and cards."""

from __future__ import annotations

from typing import Protocol


class Cuts(Protocol):
    """What says how often it happened: a plan's `DataSummary`, or a `TrainingResult`."""

    @property
    def truncated(self) -> int:
        """Rows that were cut and kept."""

    @property
    def dropped(self) -> int:
        """Rows left out because nothing in them is trained."""

    @property
    def long_dropped(self) -> int:
        """Rows left out because they are too long."""

    @property
    def split(self) -> int:
        """Rows that became several."""

    @property
    def pieces(self) -> int:
        """Rows that these became."""

    @property
    def pieces_dropped(self) -> int:
        """Pieces left out because nothing in them is trained."""


def cuts_text(cuts: Cuts, seq_len: int, stage: str = "sft") -> str:
    """Write what became of long rows; empty where every row is whole.

    Args:
        cuts: How often.
        seq_len: Tokens in a sequence.
        stage: "dpo" for preference pairs.
    """
    noun, why = "row", "nothing of an answer is left"
    if stage == "dpo":
        noun, why = "pair", "nothing is left that tells the answers apart"
    longer = f"longer than {seq_len:,} tokens"
    parts = [
        (cuts.truncated, f"{_are(cuts.truncated, noun)} cut to {seq_len:,} tokens"),
        (
            cuts.split,
            f"{_count(cuts.split, noun)} {longer} became {cuts.pieces:,}, counted one by one",
        ),
        (cuts.long_dropped, f"{_are(cuts.long_dropped, noun)} {longer} and left out"),
        (cuts.dropped, f"{_are(cuts.dropped, noun)} left out: {why}"),
        (
            cuts.pieces_dropped,
            f"{_are(cuts.pieces_dropped, 'piece')} left out: nothing of an answer there",
        ),
    ]
    return "; ".join(text for count, text in parts if count)


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _are(count: int, noun: str) -> str:
    return f"{_count(count, noun)} {'is' if count == 1 else 'are'}"
