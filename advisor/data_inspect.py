"""What is in a data set: lengths, what a sequence length cuts and costs, repeats, samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_advisor.advisor.data_cuttings import Cutting, cuttings_of
from lora_advisor.advisor.data_repeats import Repeats, place, repeats_of
from lora_advisor.advisor.datafit import covering_length
from lora_advisor.probes.architectures import Architecture
from lora_advisor.probes.cutting import check_long_rows, cut_rows
from lora_advisor.probes.dataset import Example, Examples, read_examples
from lora_advisor.probes.errors import UsageError
from lora_advisor.probes.layout import IGNORED, Encoded, unseen
from lora_advisor.probes.tokens import check_vocabulary, encode, length_quantiles, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Rows whose tokens take more than some ten seconds to count (2 CPU cores, rows of 200 tokens).
_MANY = 20_000
#: Shares of the rows whose length is told.
SHARES = (0.5, 0.9, 0.99)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A row as the model sees it.

    Attributes:
        place: Where it stands.
        parts: Its text in order, and of each part whether it is trained; None for whether where no
            tokenizer says.
        tokens: How many there are; None likewise.
        cut: What became of the rest, or of all; empty for nothing.
    """

    place: str
    parts: tuple[tuple[str, bool | None], ...]
    tokens: int | None
    cut: str = ""


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What `data inspect` tells.

    Attributes:
        examples: The rows.
        model: The model's name.
        unit: What lengths are counted in: "tokens", or "characters" without a tokenizer.
        chat_template: Whether the tokenizer has one; None without a tokenizer.
        lengths: Length of every row, before cutting.
        trained_tokens: Tokens that are trained, before cutting; None without a tokenizer.
        unseen: Parts of the rows that the chat template leaves out.
        planned: The sequence length that `plan` proposes; None without a tokenizer.
        seq_len: The sequence length asked for, else the planned one; None likewise.
        long_rows: What becomes of longer rows.
        cuttings: What sequence lengths make of the rows, shortest first; empty without a tokenizer.
        repeats: Duplicates and empty answers.
        samples: A few rows.
    """

    examples: Examples
    model: str
    unit: str
    chat_template: bool | None
    lengths: Sequence[int]
    trained_tokens: int | None
    unseen: tuple[str, ...]
    planned: int | None
    seq_len: int | None
    long_rows: str
    cuttings: tuple[Cutting, ...]
    repeats: Repeats
    samples: tuple[Sample, ...]

    @property
    def quantiles(self) -> dict[float, int]:
        """The smallest length that covers each of `SHARES`."""
        return length_quantiles(self.lengths, SHARES)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        told = {
            name: value for name, value in vars(self).items() if name not in ("examples", "lengths")
        }
        for name in ("cuttings", "samples"):
            told[name] = [asdict(part) for part in told[name]]
        examples = {name: value for name, value in vars(self.examples).items() if name != "rows"}
        lengths = {
            "min": min(self.lengths),
            **{f"{100 * share:g} %": length for share, length in self.quantiles.items()},
            "max": max(self.lengths),
            "sum": sum(self.lengths),
        }
        return {
            "data": {**examples, "path": str(self.examples.path)},
            "rows": len(self.examples.rows),
            "lengths": lengths,
            **told,
            "repeats": asdict(self.repeats),
        }


def inspect(
    path: Path,
    architecture: Architecture,
    *,
    seq_len: int | None = None,
    long_rows: str = "truncate",
    samples: int = 3,
    say: Callable[[str], None] = lambda _: None,
) -> DataReport:
    """Return what is in a data set, in tokens where the model has a tokenizer.

    Args:
        path: What `read_examples` reads.
        architecture: The model.
        seq_len: Tokens in a sequence; None for what `plan` proposes.
        long_rows: What becomes of longer rows: one of `LONG_ROWS`.
        samples: Rows to show.
        say: Told what takes long.

    Raises:
        AdvisorError: Of the kind that says what the caller must mend.
    """
    check_long_rows(long_rows)
    if samples < 0:
        raise UsageError(f"`--samples` must be at least 0, but got {samples}.")
    if seq_len is not None and seq_len < 2:
        raise UsageError(f"`--seq` must be at least 2 tokens, but got {seq_len}.")
    examples = read_examples(path)
    if architecture.weights is not None and len(examples.rows) > _MANY:
        say(f"counting the tokens of {len(examples.rows):,} rows")
    counted = _in_characters if architecture.weights is None else _in_tokens
    return DataReport(
        examples=examples,
        model=architecture.name,
        long_rows=long_rows,
        repeats=repeats_of(examples.rows),
        **counted(examples, architecture, seq_len, long_rows, samples),
    )


def _in_characters(
    examples: Examples, _: Architecture, seq_len: int | None, __: str, samples: int
) -> dict[str, Any]:
    """Return what can be told of the rows without a tokenizer."""
    shown = (examples.rows[index] for index in _chosen(len(examples.rows), samples))
    return {
        "unit": "characters",
        "chat_template": None,
        "lengths": [sum(len(turn.content) for turn in row.turns) for row in examples.rows],
        "trained_tokens": None,
        "unseen": (),
        "planned": None,
        "seq_len": seq_len,
        "cuttings": (),
        "samples": tuple(_untokenised(row) for row in shown),
    }


def _in_tokens(
    examples: Examples,
    architecture: Architecture,
    seq_len: int | None,
    long_rows: str,
    samples: int,
) -> dict[str, Any]:
    tokenizer = load_tokenizer(architecture)
    encoded = encode(examples, tokenizer)
    check_vocabulary([{"input_ids": row.ids} for row in encoded if row.ids], architecture)
    lengths = [len(row.ids) for row in encoded]
    planned = covering_length(lengths)
    seq_len = planned if seq_len is None else seq_len
    return {
        "unit": "tokens",
        "chat_template": tokenizer.chat_template is not None,
        "lengths": lengths,
        "trained_tokens": sum(label != IGNORED for row in encoded for label in row.labels),
        "unseen": unseen(examples.rows, tokenizer),
        "planned": planned,
        "seq_len": seq_len,
        "cuttings": cuttings_of(encoded, {planned, seq_len}, long_rows),
        "samples": tuple(
            _sample(examples.rows[index], encoded[index], tokenizer, seq_len, long_rows)
            for index in _chosen(len(examples.rows), samples)
        ),
    }


def _chosen(rows: int, samples: int) -> list[int]:
    """Return which rows are shown: evenly apart, the first among them."""
    count = min(rows, samples)
    return [index * rows // count for index in range(count)]


def _untokenised(row: Example) -> Sample:
    parts = tuple((f"[{turn.role}]\n{turn.content}\n", None) for turn in row.turns)
    return Sample(place=place(row), parts=parts, tokens=None)


def _sample(
    row: Example,
    encoded: Encoded,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    long_rows: str,
) -> Sample:
    data = cut_rows([encoded], seq_len, long_rows)
    if not data.rows:
        why = "too long" if data.long_dropped else "nothing in it is trained"
        shown, cut = {"input_ids": encoded.ids, "labels": encoded.labels}, f"left out: {why}"
    else:
        shown = data.rows[0]
        cut = f"the first of {data.pieces} pieces" if data.split else ""
        cut = f"cut from {len(encoded.ids):,} tokens" if data.truncated else cut
    parts: list[tuple[str, bool | None]] = []
    pairs = zip(shown["input_ids"], shown["labels"], strict=True)
    for trained, tokens in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        text = tokenizer.decode([token for token, _ in tokens], clean_up_tokenization_spaces=False)
        parts.append((str(text), trained))
    return Sample(place=place(row), parts=tuple(parts), tokens=len(shown["input_ids"]), cut=cut)
