"""What the user's data asks for: a sequence length, and how many tokens there are to train."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_advisor.advisor.lengths import length_counts
from lora_advisor.probes.architectures import Architecture
from lora_advisor.probes.cutting import TokenisedData, cut_rows
from lora_advisor.probes.dataset import read_examples
from lora_advisor.probes.errors import UsageError
from lora_advisor.probes.pair_tokens import cut_pairs, encode_pairs, pair_tokens
from lora_advisor.probes.pairs import read_pairs
from lora_advisor.probes.plan import DataSummary
from lora_advisor.probes.preference import pair_length
from lora_advisor.probes.tokens import cut, encode, length_quantiles, load_tokenizer

#: The proposed length covers this share of the rows, in steps of 64 tokens, up to the ceiling.
COVERED = 0.99
_STEP = 64
_CEILING = 2048


def covering_length(lengths: Sequence[int]) -> int:
    """Return the sequence length that `plan` proposes for rows of these lengths."""
    covering = length_quantiles(lengths, (COVERED,))[COVERED]
    return min(_CEILING, -(-covering // _STEP) * _STEP)


def summarise(
    path: Path, architecture: Architecture, seq_len: int | None, *, long_rows: str = "truncate"
) -> tuple[DataSummary, int]:
    """Return what a data file holds for a model, and the sequence length to train with.

    Raises:
        UsageError: The model has no tokenizer to count with.
        AdvisorError: The data cannot be read.
    """
    _check_tokenizer(architecture)
    examples = read_examples(path)
    encoded = encode(examples, load_tokenizer(architecture))
    if seq_len is None:
        seq_len = covering_length([len(row.ids) for row in encoded])
    data = cut(examples, encoded, seq_len, long_rows=long_rows)
    return _summary(path, data), seq_len


def shortened(
    path: Path, architecture: Architecture, lengths: Sequence[int], *, long_rows: str
) -> dict[int, DataSummary]:
    """Return what shorter sequences would make of the data, those that leave no row left out.

    Raises:
        AdvisorError: The data cannot be read any more.
    """
    encoded = encode(read_examples(path), load_tokenizer(architecture))
    cut_to = {length: cut_rows(encoded, length, long_rows) for length in lengths}
    return {length: _summary(path, data) for length, data in cut_to.items() if data.rows}


def _summary(path: Path, data: TokenisedData) -> DataSummary:
    counted = ("truncated", "dropped", "long_dropped", "split", "pieces", "pieces_dropped")
    return DataSummary(
        path=str(path),
        rows=len(data.rows),
        tokens=sum(len(row["input_ids"]) for row in data.rows),
        length_counts=length_counts(len(row["input_ids"]) for row in data.rows),
        **{name: getattr(data, name) for name in counted},
    )


def summarise_pairs(
    path: Path, architecture: Architecture, seq_len: int | None
) -> tuple[DataSummary, int]:
    """Return the same of preference pairs; the length of a pair is that of its longer sequence.

    Raises:
        UsageError: The model has no tokenizer to count with.
        AdvisorError: The data cannot be read, or holds no pairs.
    """
    _check_tokenizer(architecture)
    pairs = read_pairs(path)
    encoded = encode_pairs(pairs, load_tokenizer(architecture))
    if seq_len is None:
        seq_len = covering_length([pair_length(row) for row in encoded])
    data = cut_pairs(pairs, encoded, seq_len)
    summary = DataSummary(
        path=str(path),
        rows=len(data.rows),
        tokens=sum(pair_tokens(row) for row in data.rows),
        truncated=data.truncated,
        dropped=data.dropped,
        length_counts=length_counts(pair_length(row) for row in data.rows),
        sequences=2,
    )
    return summary, seq_len


def _check_tokenizer(architecture: Architecture) -> None:
    if architecture.weights is None:
        raise UsageError(
            f"`--data` needs the model's tokenizer, but `{architecture.name}` is only figures; "
            "give --model as a folder or a hub id."
        )
