"""Batches of token rows: padded ones, and random ones of full length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Collator:
    """Pads rows to the longest of the batch, or on to the next multiple.

    A batch of full rows gets no attention mask, as a user's collator of fixed-length blocks does:
    the mask would switch attention to a slower, larger path.
    """

    pad_token_id: int
    multiple: int = 1

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
        """Return {"input_ids", "labels"[, "attention_mask"]}, each of shape (rows, longest)."""
        import torch

        longest = max(len(row["input_ids"]) for row in rows)
        longest = -(-longest // self.multiple) * self.multiple
        ids = torch.full((len(rows), longest), self.pad_token_id, dtype=torch.long)
        labels = torch.full((len(rows), longest), -100, dtype=torch.long)
        mask = torch.zeros((len(rows), longest), dtype=torch.long)
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[index, :length] = torch.tensor(row["input_ids"])
            labels[index, :length] = torch.tensor(row["labels"])
            mask[index, :length] = 1
        batch = {"input_ids": ids, "labels": labels}
        if any(len(row["input_ids"]) != longest for row in rows):
            batch["attention_mask"] = mask
        return batch


def random_rows(
    count: int, seq_len: int, vocab_size: int, *, seed: int = 0
) -> list[dict[str, list[int]]]:
    """Return `count` rows of `seq_len` random tokens, each with a loss: the worst case."""
    import numpy

    generator = numpy.random.default_rng(seed)
    tokens = generator.integers(min(2, vocab_size - 1), vocab_size, size=(count, seq_len))
    return [{"input_ids": row, "labels": row} for row in tokens.tolist()]
