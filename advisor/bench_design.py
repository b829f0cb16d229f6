"""The factorial of `bench`: which configurations run, how often, and in what order."""

from __future__ import annotations

import difflib
import itertools
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_advisor.probes.config import METHODS, OPTIMIZERS, PRECISIONS, RunConfig
from lora_advisor.probes.errors import UnavailableError, UsageError
from lora_advisor.probes.weights import require_packages

#: The factors, in the order of a cell's levels.
FACTORS = ("method", "optimizer", "precision", "size")

#: Levels where none are given. The paper (see paper.py) compares PyTorch's AdamW with the 8-bit
#: paged one; the fused one is what Trainer takes today. Of the sizes 1x512, 2x1024 and 2x2048 are
#: the paper's; 2x512 parts the effect of the micro-batch from that of the length.
DEFAULTS: Mapping[str, tuple[str, ...]] = {
    "method": ("lora", "qlora"),
    "optimizer": ("adamw_torch", "adamw_torch_fused", "paged_adamw_8bit"),
    "precision": ("fp16", "bf16"),
    "size": ("1x512", "2x512", "2x1024", "2x2048"),
}
#: On a CPU there is no loss scaling for fp16, and bf16 is slower than fp32.
CPU_PRECISIONS = ("fp32",)

#: The option that sets the levels of each factor.
OPTIONS = {
    "method": "--methods",
    "optimizer": "--optimizers",
    "precision": "--precisions",
    "size": "--sizes",
}
_WORDS = {"method": METHODS, "optimizer": OPTIMIZERS, "precision": PRECISIONS}
_SIZE = re.compile(r"([1-9][0-9]{0,6})x([1-9][0-9]{0,6})")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One combination of levels.

    Attributes:
        levels: One level a factor, in the order of FACTORS.
        config: What runs; None where there is no such configuration, or not here.
        reason: Why there is none.
    """

    levels: tuple[str, ...]
    config: RunConfig | None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Design:
    """What a bench runs.

    Attributes:
        base: What all cells share; its own levels mean nothing.
        factors: The levels of each factor.
        cells: Every combination.
        repeats: How often each is to be measured.
        seed: Of the order.
    """

    base: RunConfig
    factors: Mapping[str, tuple[str, ...]]
    cells: tuple[Cell, ...]
    repeats: int
    seed: int

    def __post_init__(self) -> None:
        """Refuse a number of repeats that measures nothing."""
        if self.repeats < 1:
            raise UsageError(f"`--repeats` must be at least 1, but got {self.repeats}.")

    def cell_of(self, config: RunConfig) -> Cell | None:
        """Return the cell that a configuration belongs to; None if it is of another design."""
        return next((cell for cell in self.cells if cell.config == config), None)

    def order(self, repeat: int) -> tuple[Cell, ...]:
        """Return the cells in the order of one repeat: each repeat is a block of its own.

        What drifts (temperature, clocks) then meets every level alike.
        """
        cells = list(self.cells)
        random.Random(f"{self.seed} {repeat}").shuffle(cells)
        return tuple(cells)


def size_text(micro_batch: int, seq_len: int) -> str:
    """Write a size as a level."""
    return f"{micro_batch}x{seq_len}"


def size_of(level: str) -> tuple[int, int]:
    """Return micro-batch and length of a size.

    Raises:
        UsageError: It is no size.
    """
    match = _SIZE.fullmatch(level)
    if match is None or int(match[2]) < 2:
        raise UsageError(
            "`--sizes` must be micro-batch x tokens with commas, such as 1x1024,2x1024, but got "
            f"{level!r}."
        )
    return int(match[1]), int(match[2])


def levels_of(factor: str, text: str | None, default: Sequence[str]) -> tuple[str, ...]:
    """Return the levels that an option names, or the default.

    Raises:
        UsageError: A level is unknown, or stands there twice.
    """
    if text is None:
        return tuple(default)
    levels = tuple(part.strip() for part in text.split(","))
    for level in levels:
        if factor == "size":
            size_of(level)
        elif level not in _WORDS[factor]:
            raise UsageError(_unknown(factor, level))
    if len(set(levels)) < len(levels):
        raise UsageError(f"`{OPTIONS[factor]}` must name each level once, but got {text!r}.")
    return levels


def _unknown(factor: str, level: str) -> str:
    words = _WORDS[factor]
    known = ", ".join(words)
    if len(words) > 5:
        close = difflib.get_close_matches(level, words, n=3, cutoff=0.5)
        known = "transformers' optimizers"
        hint = f"; did you mean {' or '.join(close)}?" if close else "."
    else:
        hint = "."
    return f"`{OPTIONS[factor]}` must be words of {known} with commas, but got {level!r}{hint}"


def make_design(
    base: RunConfig,
    factors: Mapping[str, tuple[str, ...]],
    *,
    device: str,
    repeats: int,
    seed: int,
) -> Design:
    """Return the full factorial; combinations that cannot run keep their place and their reason.

    Args:
        base: A configuration with an adapter, which gives what all cells share.
        factors: The levels of each of FACTORS.
        device: "cuda" or "cpu".
        repeats: How often each cell is to be measured.
        seed: Of the order.
    """
    combinations = itertools.product(*(factors[name] for name in FACTORS))
    cells = tuple(_cell(base, levels, device) for levels in combinations)
    return Design(base=base, factors=dict(factors), cells=cells, repeats=repeats, seed=seed)


def _cell(base: RunConfig, levels: tuple[str, ...], device: str) -> Cell:
    method, optimizer, precision, size = levels
    micro_batch, seq_len = size_of(size)
    try:
        config = base.replace(
            method=method,
            optimizer=optimizer,
            precision=precision,
            micro_batch=micro_batch,
            seq_len=seq_len,
            lora=None if method == "full" else base.lora,
        )
        require_packages(config, device)
    except (UsageError, UnavailableError) as error:
        return Cell(levels=levels, config=None, reason=str(error))
    return Cell(levels=levels, config=config)
