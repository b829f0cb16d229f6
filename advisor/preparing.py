"""What a training needs before it begins: the data as rows of tokens, and what all depends on."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_advisor.advisor.known_rows import NO_KNOWN_PAIRS, Place
from lora_advisor.advisor.schedule import Settings
from lora_advisor.probes.architectures import Architecture
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.cutting import TokenisedData, TokenRow, check_long_rows
from lora_advisor.probes.dataset import Examples, read_examples
from lora_advisor.probes.errors import UnavailableError, UsageError
from lora_advisor.probes.pair_tokens import TokenisedPairs, tokenize_pairs
from lora_advisor.probes.pairs import Pairs, read_pairs
from lora_advisor.probes.tokens import (
    check_vocabulary,
    cut,
    encode,
    length_quantiles,
    load_tokenizer,
    split_holdout,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Data:
    """The user's data, ready.

    Attributes:
        examples: The rows or pairs as they came.
        tokens: All of them as tokens.
        tokenizer: What made them.
        train: Rows to train on.
        places: Where each of these stands in the user's data; empty for pairs, of which none is
            ever listed.
        held: Rows held out.
        held_sources: Which row of the file each of these is of, where some became several; empty
            where none did.
    """

    examples: Examples | Pairs
    tokens: TokenisedData | TokenisedPairs
    tokenizer: PreTrainedTokenizerBase
    train: Sequence[TokenRow]
    places: Sequence[Place]
    held: Sequence[TokenRow]
    held_sources: Sequence[int] = ()


def require(config: RunConfig, device: str, *, tensorboard: bool) -> None:
    """Refuse what cannot be trained here.

    Raises:
        UsageError: It is another engine's, or PyTorch was not told in time.
        UnavailableError: A package is missing.
    """
    from importlib.util import find_spec

    from lora_advisor.probes.weights import require_packages

    require_packages(config, device)
    if tensorboard and not (find_spec("tensorboard") or find_spec("tensorboardX")):
        raise UnavailableError(
            "`--tensorboard` needs the package tensorboard, which is not installed; install it, "
            "or read progress.jsonl in the output folder."
        )
    if config.allocator == "expandable_segments" and device == "cuda":
        setting = os.environ.get(
            "PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
        )
        if "expandable_segments:True" not in setting:
            raise UsageError(
                '`allocator` "expandable_segments" must be set before PyTorch is imported; start '
                "with PYTORCH_ALLOC_CONF=expandable_segments:True."
            )


def prepare(config: RunConfig, architecture: Architecture, data: Path, settings: Settings) -> Data:
    """Read the data and hold some of it out.

    Raises:
        AdvisorError: The data, or the model's tokenizer, is not what it must be.
    """
    check_long_rows(settings.long_rows, config.stage)
    if config.stage == "dpo":
        return _prepare_pairs(config, architecture, data, settings)
    examples = read_examples(data)
    tokenizer = load_tokenizer(architecture)
    encoded = encode(examples, tokenizer)
    tokens = cut(examples, encoded, config.seq_len, long_rows=settings.long_rows)
    check_vocabulary(tokens.rows, architecture)
    ids = [id(row) for row in tokens.rows]
    places = dict(zip(ids, _places(examples, tokens), strict=True))
    sources = dict(zip(ids, tokens.sources, strict=True))
    train, held = split_holdout(
        tokens.rows, settings.holdout, seed=settings.seed, sources=tokens.sources
    )
    return Data(
        examples=examples,
        tokens=tokens,
        tokenizer=tokenizer,
        train=train,
        places=[places[id(row)] for row in train],
        held=held,
        held_sources=[sources[id(row)] for row in held] if tokens.split else (),
    )


def _places(examples: Examples, tokens: TokenisedData) -> Iterator[Place]:
    """Yield where each row of tokens stands; of a row that became several, which piece it is."""
    pieces, seen = Counter(tokens.sources), Counter[int]()
    for source in tokens.sources:
        seen[source] += 1
        example = examples.rows[source]
        piece = seen[source] if pieces[source] > 1 else None
        yield Place(file=example.file, line=example.line, piece=piece)


def _prepare_pairs(
    config: RunConfig, architecture: Architecture, data: Path, settings: Settings
) -> Data:
    if settings.drop_known or settings.check_rows:
        option = "--drop-known" if settings.drop_known else "--check-rows"
        raise UsageError(
            f"`{option}` must be left out with stage dpo: {NO_KNOWN_PAIRS}, so none is listed or "
            "dropped."
        )
    pairs = read_pairs(data)
    tokenizer = load_tokenizer(architecture)
    tokens = tokenize_pairs(pairs, tokenizer, config.seq_len)
    check_vocabulary(tokens.rows, architecture)
    train, held = split_holdout(tokens.rows, settings.holdout, seed=settings.seed)
    return Data(
        examples=pairs, tokens=tokens, tokenizer=tokenizer, train=train, places=(), held=held
    )


def identity(
    config: RunConfig, architecture: Architecture, ready: Data, settings: Settings
) -> dict[str, Any]:
    """Return all that decides the weights that come out, as JSON gives it back."""
    return {
        "data": ready.examples.sha256,
        "architecture": architecture.fingerprint,
        **settings.identity(),
        **config.to_json(),
    }


def data_figures(ready: Data, data: Path, *, rows: int) -> dict[str, Any]:
    """Return what a `TrainingResult` says of the data, of which so many rows were trained on."""
    return {
        "data": Path(data),
        "data_sha256": ready.examples.sha256,
        "shape": ready.examples.shape,
        "rows": rows,
        "holdout_rows": len(ready.held),
        "truncated": ready.tokens.truncated,
        "dropped": ready.tokens.dropped,
        **_cuts(ready.tokens),
        "length_quantiles": length_quantiles(ready.tokens.lengths),
    }


def _cuts(tokens: TokenisedData | TokenisedPairs) -> dict[str, int]:
    """Return what became of long rows beside those that were cut."""
    if not isinstance(tokens, TokenisedData):
        return {}
    names = ("long_dropped", "split", "pieces", "pieces_dropped")
    return {name: getattr(tokens, name) for name in names}
