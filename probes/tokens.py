"""Rows of tokens from rows of text: which tokens are trained, which are cut, which rows are left.

The loss is taken on what the model shall say: the assistant's turns with the end-of-sequence token
behind them, or all of a plain text. Where the tokenizer has a chat template, every conversation
goes through it; otherwise `plain_layout` is used.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_advisor.probes.architectures import Architecture
from lora_advisor.probes.dataset import Example, Examples, Turn
from lora_advisor.probes.errors import DataError, MissingInputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: What the loss ignores (torch.nn.CrossEntropyLoss, `ignore_index`).
IGNORED = -100

#: Tokens that model families use for padding, where their tokenizer does not say so.
PADDING_NAMES = (
    "<pad>",
    "[PAD]",
    "<|finetune_right_pad_id|>",
    "<|padding|>",
    "<|endoftext|>",
    "<unk>",
)

#: From where to where the assistant speaks; an end of None is the end of the row.
_Span = tuple[int, int | None]

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
    """

    rows: tuple[TokenRow, ...] = field(repr=False)
    truncated: int
    dropped: int
    lengths: tuple[int, ...] = field(repr=False)


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


def plain_layout(turns: Sequence[Turn], shape: str) -> str:
    """Return what comes before an answer, as text, where there is no chat template.

    A prompt stands as given, and its completion right behind it. Other turns stand under a line
    "### User:" (or the turn's role) with an empty line between them; "### Assistant:" comes last.
    """
    if shape == "prompt/completion" and len(turns) == 1:
        return turns[0].content
    said = (f"### {turn.role.capitalize()}:\n{turn.content}\n\n" for turn in turns)
    return "".join(said) + "### Assistant:\n"


def tokenize(examples: Examples, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> TokenisedData:
    """Turn rows of text into rows of tokens.

    Args:
        examples: The rows.
        tokenizer: As `load_tokenizer` returns it.
        seq_len: Tokens to cut a row to.

    Raises:
        DataError: The chat template refuses a row, or no row has a trained token.
    """
    rows: list[TokenRow] = []
    lengths: list[int] = []
    truncated = dropped = 0
    for example in examples.rows:
        row = _row(example, examples, tokenizer)
        length = len(row["input_ids"])
        lengths.append(length)
        row = {name: values[:seq_len] for name, values in row.items()}
        if all(label == IGNORED for label in row["labels"]):
            dropped += 1
            continue
        truncated += length > seq_len
        rows.append(row)
    if not rows:
        raise DataError(
            f"`{examples.path}` must have answers that begin within {seq_len} tokens, but none of "
            f"its {len(examples.rows)} rows has one; give a longer --seq."
        )
    return TokenisedData(
        rows=tuple(rows), truncated=truncated, dropped=dropped, lengths=tuple(lengths)
    )


def _row(example: Example, examples: Examples, tokenizer: PreTrainedTokenizerBase) -> TokenRow:
    ids: list[int]
    spans: list[_Span]
    if examples.shape == "text":
        ids, spans = _encode(tokenizer, example.turns[0].content, special=True), [(0, None)]
    elif tokenizer.chat_template is not None:
        ids, spans = _templated(example, examples, tokenizer)
    else:
        ids, spans = _plain(example, examples, tokenizer)
    eos = _eos(tokenizer)
    labels = [IGNORED] * len(ids)
    for start, end in spans:
        said = ids[start:end]
        if eos in said:  # a template may write a line's end behind it, which nobody needs to learn
            said = said[: len(said) - said[::-1].index(eos)]
        labels[start : start + len(said)] = said
        if end is None and said:
            ids, labels = ids[: start + len(said)], labels[: start + len(said)]
            if said[-1] != eos:
                ids, labels = [*ids, eos], [*labels, eos]
    # The first token is predicted from nothing: models shift the labels by one.
    return {"input_ids": ids, "labels": [IGNORED, *labels[1:]]}


def _templated(
    example: Example, examples: Examples, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[_Span]]:
    """Find the assistant's turns by what the template adds for each of them.

    Most templates have no markers around what the assistant says, so the tokens of the conversation
    up to a turn are compared with those of the whole.
    """

    def tokens(count: int, *, prompt: bool) -> list[int]:
        turns = [{"role": turn.role, "content": turn.content} for turn in example.turns[:count]]
        try:
            text = tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # templates raise what jinja and their authors chose
            raise DataError(
                f"`{examples.path}`, row {example.line} must suit the model's chat template, but "
                f"that says: {error}."
            ) from None
        return _encode(tokenizer, str(text), special=False)

    last = max(i for i, turn in enumerate(example.turns) if turn.role == "assistant") + 1
    whole = tokens(last, prompt=False)
    spans: list[_Span] = []
    for index, turn in enumerate(example.turns[:last]):
        if turn.role != "assistant" or index == 0 or not turn.content.strip():
            continue
        start = _common(whole, tokens(index, prompt=True))
        end = None if index + 1 == last else _common(whole, tokens(index + 1, prompt=False))
        spans.append((start, end))
    return whole, spans


def _plain(
    example: Example, examples: Examples, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[_Span]]:
    ids: list[int] = []
    spans: list[_Span] = []
    eos = _eos(tokenizer)
    said = 0
    for index, turn in enumerate(example.turns):
        if turn.role != "assistant" or index == 0:
            continue
        asked = plain_layout(example.turns[said:index], examples.shape)
        ids += _encode(tokenizer, asked, special=said == 0)
        start = len(ids)
        ids += [*_encode(tokenizer, turn.content, special=False), eos]
        said = index + 1
        if turn.content.strip():
            spans.append((start, None if said == len(example.turns) else len(ids)))
    return ids, spans


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    eos = tokenizer.eos_token_id
    assert isinstance(eos, int)
    return eos


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    if special and ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]  # some tokenizers close every text themselves
    return ids


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many tokens two rows share from the start on."""
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return min(len(left), len(right))


def split_holdout(
    rows: Sequence[TokenRow], share: float = 0.1, *, seed: int = 0
) -> tuple[list[TokenRow], list[TokenRow]]:
    """Return (rows to train on, rows held out): the same for the same rows, share and seed.

    Args:
        rows: Tokenised rows.
        share: Share to hold out, in [0, 1): at least one row where it is above 0.
        seed: Decides which.

    Raises:
        DataError: There is no row left to train on.
    """
    count = max(1, round(share * len(rows))) if share > 0 else 0
    if count >= len(rows):
        raise DataError(
            f"the data must have more than {count} usable rows, to hold {count} out and train on "
            f"the rest, but has {len(rows)}; bring more rows or hold none out."
        )
    held = set(random.Random(seed).sample(range(len(rows)), count))
    train = [row for index, row in enumerate(rows) if index not in held]
    return train, [rows[index] for index in sorted(held)]


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
    largest = max(max(row["input_ids"]) for row in rows)
    if size is not None and largest >= size:
        raise DataError(
            f"the tokenizer of `{architecture.name}` must stay below the model's {size} tokens, "
            f"but gives token {largest}; it belongs to another model."
        )
