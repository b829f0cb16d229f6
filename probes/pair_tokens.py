"""Preference pairs as rows of tokens, as stage "dpo" trains on them (`preference.COLUMNS`).

Each answer is laid out behind its prompt as a row of stage "sft" is (probes/layout.py); what both
rows have in front of the answer is the prompt. Long rows are cut at their end, as TRL does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lora_advisor.probes.dataset import Example
from lora_advisor.probes.errors import DataError
from lora_advisor.probes.layout import IGNORED, Encoded, lay_out
from lora_advisor.probes.pairs import Pair, Pairs
from lora_advisor.probes.preference import pair_length
from lora_advisor.probes.turns import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: A pair as TRL's collator takes it: "prompt_ids", "chosen_ids" and "rejected_ids".
PairRow = dict[str, list[int]]


@dataclass(frozen=True, kw_only=True)
class TokenisedPairs:
    """Pairs ready for training, and what was lost on the way.

    Attributes:
        rows: Pairs of which prompt and either answer are at most `seq_len` tokens.
        truncated: Pairs of which an answer was cut.
        dropped: Pairs left out: their prompt left no room for an answer, or what was left of both
            answers is the same, which teaches nothing.
        lengths: Tokens of the longer answer of every pair, its prompt included, before cutting.
    """

    rows: tuple[PairRow, ...] = field(repr=False)
    truncated: int
    dropped: int
    lengths: tuple[int, ...] = field(repr=False)


def tokenize_pairs(
    pairs: Pairs, tokenizer: PreTrainedTokenizerBase, seq_len: int
) -> TokenisedPairs:
    """Turn pairs of text into pairs of tokens that fit a sequence.

    Args:
        pairs: The pairs.
        tokenizer: As `load_tokenizer` returns it.
        seq_len: Tokens in one sequence: a prompt and one answer.

    Raises:
        DataError: The chat template refuses a row, or no pair has room for an answer.
    """
    return cut_pairs(pairs, encode_pairs(pairs, tokenizer), seq_len)


def encode_pairs(pairs: Pairs, tokenizer: PreTrainedTokenizerBase) -> tuple[PairRow, ...]:
    """Turn pairs of text into pairs of tokens, each as long as it is.

    Raises:
        DataError: The chat template refuses a row, or its answers are the same.
    """
    # A prompt that is text stands as given where there is no chat template, as in stage "sft".
    shape = "prompt/completion" if "prompt" in pairs.columns else "messages"
    return tuple(encode_pair(pair, shape, tokenizer) for pair in pairs.rows)


def cut_pairs(pairs: Pairs, encoded: Sequence[PairRow], seq_len: int) -> TokenisedPairs:
    """Do the second half of `tokenize_pairs`, with what `encode_pairs` returned.

    Raises:
        DataError: No pair has room for answers that differ.
    """
    rows: list[PairRow] = []
    truncated = 0
    for row in encoded:
        room = seq_len - len(row["prompt_ids"])
        cut = {name: row[name][: max(0, room)] for name in ("chosen_ids", "rejected_ids")}
        if cut["chosen_ids"] == cut["rejected_ids"]:
            continue
        truncated += pair_length(row) > seq_len
        rows.append({"prompt_ids": row["prompt_ids"], **cut})
    if not rows:
        raise DataError(
            f"`{pairs.path}` must have prompts below {seq_len} tokens, to leave room for answers "
            f"that differ, but none of its {len(pairs.rows)} rows has one; give a longer --seq."
        )
    return TokenisedPairs(
        rows=tuple(rows),
        truncated=truncated,
        dropped=len(encoded) - len(rows),
        lengths=tuple(pair_length(row) for row in encoded),
    )


def pair_tokens(row: PairRow) -> int:
    """Return the tokens of a pair's two sequences, its prompt counted twice as it is computed."""
    return 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])


def encode_pair(pair: Pair, shape: str, tokenizer: PreTrainedTokenizerBase) -> PairRow:
    """Return a pair's tokens, as long as they are.

    Raises:
        DataError: The chat template refuses the row, or the answers are the same.
    """
    chosen, rejected = (
        _lay_out(pair, (*pair.prompt, *answer), shape, tokenizer)
        for answer in (pair.chosen, pair.rejected)
    )
    if chosen.ids == rejected.ids:
        raise DataError(
            f"`{pair.file}`, row {pair.line} must have answers that differ, but `chosen` and "
            "`rejected` come to the same tokens."
        )
    if pair.prompt[0].role == "text":
        asked = _lay_out(pair, pair.prompt, shape, tokenizer).ids
        start = min(_alike(asked, chosen.ids), _alike(asked, rejected.ids))
    else:
        alike = _alike(chosen.ids, rejected.ids)
        start = min(_begin(chosen, alike), _begin(rejected, alike))
    return {
        "prompt_ids": chosen.ids[:start],
        "chosen_ids": chosen.ids[start:],
        "rejected_ids": rejected.ids[start:],
    }


def _lay_out(
    pair: Pair, turns: Sequence[Turn], shape: str, tokenizer: PreTrainedTokenizerBase
) -> Encoded:
    if turns[0].role == "text":  # parts of a text
        turns = (Turn(role="text", content="".join(turn.content for turn in turns)),)
    example = Example(turns=tuple(turns), line=pair.line, file=pair.file, tools=pair.tools)
    return lay_out(example, shape, tokenizer)


def _begin(row: Encoded, alike: int) -> int:
    """Return where the answer begins within which two rows part: behind so many tokens."""
    last = min(alike, len(row.labels) - 1)
    for place in range(last, 0, -1):
        if row.labels[place] != IGNORED and row.labels[place - 1] == IGNORED:
            return place
    return alike


def _alike(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many tokens two rows share from the start on."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((n for n, (one, other) in pairs if one != other), min(len(left), len(right)))
