"""What the user's data asks for: a sequence length, and how many tokens there are to train."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_advisor.advisor.lengths import length_counts
from lora_advisor.probes.architectures import Architecture
from lora_advisor.probes.dataset import read_examples
from lora_advisor.probes.errors import UsageError
from lora_advisor.probes.plan import DataSummary
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
    path: Path, architecture: Architecture, seq_len: int | None
) -> tuple[DataSummary, int]:
    """Return what a data file holds for a model, and the sequence length to train with.

    Raises:
        UsageError: The model has no tokenizer to count with.
        AdvisorError: The data cannot be read.
    """
    if architecture.weights is None:
        raise UsageError(
            f"`--data` needs the model's tokenizer, but `{architecture.name}` is only figures; "
            "give --model as a folder or a hub id."
        )
    examples = read_examples(path)
    encoded = encode(examples, load_tokenizer(architecture))
    if seq_len is None:
        seq_len = covering_length([len(row.ids) for row in encoded])
    data = cut(examples, encoded, seq_len)
    summary = DataSummary(
        path=str(path),
        rows=len(data.rows),
        tokens=sum(len(row["input_ids"]) for row in data.rows),
        truncated=data.truncated,
        dropped=data.dropped,
        length_counts=length_counts(len(row["input_ids"]) for row in data.rows),
    )
    return summary, seq_len
