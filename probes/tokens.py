"""Rows of tokens from rows of text: the tokenizer, the rows it makes, and those held out.

What the model sees of a row and learns to say is the matter of probes/layout.py, what becomes of
long rows that of probes/cutting.py.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lora_advisor.probes.architectures import Architecture
from lora_advisor.probes.cutting import TokenisedData, TokenRow, check_long_rows, cut_rows
from lora_advisor.probes.dataset import Examples
from lora_advisor.probes.errors import DataError, MissingInputError
from lora_advisor.probes.layout import IGNORED, Encoded, lay_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "IGNORED",
    "TokenRow",
    "TokenisedData",
    "check_vocabulary",
    "cut",
    "encode",
    "length_quantiles",
    "load_tokenizer",
    "set_padding",
    "split_holdout",
    "tokenize",
]

#: Tokens that model families use for padding, where their tokenizer does not say so.
PADDING_NAMES = (
    "<pad>",
    "[PAD]",
    "<|finetune_right_pad_id|>",
    "<|padding|>",
    "<|endoftext|>",
    "<unk>",
)


def load_tokenizer(architecture: Architecture) -> PreTrainedTokenizerBase:
    """Read the tokenizer that lies with the weights, and give it a padding token of its own.

    Raises:
        MissingInputError: The model has no weights, or no tokenizer lies with them.
        DataError: The tokenizer marks no end of sequence.
    """
    from transformers import AutoTokenizer

    if architecture.weights is None:
        raise MissingInputError(
            f"`{architecture.name}` must come with weights and a tokenizer to be trained, but only "
            "its figures are here; give a folder or a hub id."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            architecture.weights, trust_remote_code=architecture.trust_remote_code
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MissingInputError(
            f"the tokenizer of `{architecture.name}` must lie with its weights "
            f"({architecture.weights}), but {reason}"
        ) from None
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer of `{architecture.name}` must name an `eos_token`, but has none."
        )
    set_padding(tokenizer)
    return tokenizer


def set_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Choose a padding token other than the end of sequence, where the vocabulary has one.

    A collator that finds padding by its token would otherwise take the loss off the end of
    sequence, and the model would never learn to stop.
    """
    if tokenizer.pad_token is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    vocabulary = tokenizer.get_vocab()
    for name in PADDING_NAMES:
        if name in vocabulary and name != tokenizer.eos_token:
            tokenizer.pad_token = name
            return
    tokenizer.pad_token = tokenizer.eos_token  # our rows bring labels, so nothing is masked by it


def encode(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> tuple[Encoded, ...]:
    """Turn rows of text into rows of tokens, each as long as it is.

    Args:
        examples: The rows.
        tokenizer: As `load_tokenizer` returns it.

    Raises:
        DataError: The chat template refuses a row.
    """
    return tuple(lay_out(example, examples.shape, tokenizer) for example in examples.rows)


def tokenize(
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    *,
    long_rows: str = "truncate",
) -> TokenisedData:
    """Turn rows of text into rows of tokens that fit a sequence.

    Args:
        examples: The rows.
        tokenizer: As `load_tokenizer` returns it.
        seq_len: Tokens in a sequence.
        long_rows: What becomes of longer rows: one of `LONG_ROWS`.

    Raises:
        UsageError: `long_rows` is no such word.
        DataError: The chat template refuses a row, or no row has a trained token.
    """
    check_long_rows(long_rows)
    return cut(examples, encode(examples, tokenizer), seq_len, long_rows=long_rows)


def cut(
    examples: Examples, encoded: Sequence[Encoded], seq_len: int, *, long_rows: str = "truncate"
) -> TokenisedData:
    """Do the second half of `tokenize`, with what `encode` returned.

    Raises:
        UsageError: `long_rows` is none of `LONG_ROWS`.
        DataError: No row has a trained token.
    """
    data = cut_rows(encoded, seq_len, long_rows)
    if data.rows:
        return data
    if data.long_dropped:
        raise DataError(
            f"`{examples.path}` must have rows of at most {seq_len} tokens with an answer, but "
            f"none of its {len(examples.rows)} rows is one; give a longer --seq, or do not drop "
            "long rows."
        )
    raise DataError(
        f"`{examples.path}` must have answers that begin within {seq_len} tokens, but none of "
        f"its {len(examples.rows)} rows has one; give a longer --seq."
    )


def split_holdout(
    rows: Sequence[TokenRow],
    share: float = 0.1,
    *,
    seed: int = 0,
    sources: Sequence[int] | None = None,
) -> tuple[list[TokenRow], list[TokenRow]]:
    """Return (rows to train on, rows held out): the same for the same rows, share and seed.

    Args:
        rows: Tokenised rows.
        share: Share to hold out, in [0, 1): at least one row where it is above 0.
        seed: Decides which.
        sources: As `TokenisedData.sources`: pieces of one row are held out together or not at all,
            and the share is one of these rows; None where every row stands for itself.

    Raises:
        DataError: There is no row left to train on.
    """
    sources = range(len(rows)) if sources is None else sources
    whole = list(dict.fromkeys(sources))
    count = max(1, round(share * len(whole))) if share > 0 else 0
    if count >= len(whole):
        raise DataError(
            f"the data must have more than {count} usable rows, to hold {count} out and train on "
            f"the rest, but has {len(whole)}; bring more rows or hold none out."
        )
    held = {whole[index] for index in random.Random(seed).sample(range(len(whole)), count)}
    placed = list(zip(rows, sources, strict=True))
    train = [row for row, source in placed if source not in held]
    return train, [row for row, source in placed if source in held]


def length_quantiles(
    lengths: Sequence[int], shares: Sequence[float] = (0.5, 0.9, 0.95, 0.99, 1.0)
) -> dict[float, int]:
    """Return the smallest length that covers each share of the rows."""
    ordered = sorted(lengths)
    if not ordered:
        return {}
    return {share: ordered[max(0, math.ceil(share * len(ordered)) - 1)] for share in shares}


def check_vocabulary(rows: Sequence[TokenRow], architecture: Architecture) -> None:
    """Refuse tokens that the model has no embedding for, before a device does so unreadably.

    Raises:
        DataError: The tokenizer is of another model.
    """
    figures: Any = architecture.hf_config
    size = figures.get("vocab_size") or figures.get("text_config", {}).get("vocab_size")
    largest = max(max(ids, default=0) for row in rows for ids in row.values())
    if size is not None and largest >= size:
        raise DataError(
            f"the tokenizer of `{architecture.name}` must stay below the model's {size} tokens, "
            f"but gives token {largest}; it belongs to another model."
        )
