"""What the user's data asks for: a sequence length, and how many tokens there are to train."""

from __future__ import annotations

from pathlib import Path

from lora_advisor.advisor.lengths import length_counts
from lora_advisor.probes.architectures import Architecture
from lora_advisor.probes.dataset import read_examples
from lora_advisor.probes.errors import UsageError
from lora_advisor.probes.plan import DataSummary
from lora_advisor.probes.tokens import length_quantiles, load_tokenizer, tokenize

#: The proposed length covers this share of the rows, in steps of 64 tokens, up to the ceiling.
_COVERED = 0.99
_STEP = 64
_CEILING = 2048


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
    tokenizer = load_tokenizer(architecture)
    if seq_len is None:
        whole = tokenize(examples, tokenizer, _CEILING)
        covering = length_quantiles(whole.lengths, (_COVERED,))[_COVERED]
        seq_len = min(_CEILING, -(-covering // _STEP) * _STEP)
    data = tokenize(examples, tokenizer, seq_len)
    summary = DataSummary(
        path=str(path),
        rows=len(data.rows),
        tokens=sum(len(row["input_ids"]) for row in data.rows),
        truncated=data.truncated,
        dropped=data.dropped,
        length_counts=length_counts(len(row["input_ids"]) for row in data.rows),
    )
    return summary, seq_len
