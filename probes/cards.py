"""The table of cards: figures of cards that are not here, each with its source."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from lora_advisor.probes.errors import UsageError
from lora_advisor.probes.machine import GIB, Machine


@dataclass(frozen=True, kw_only=True)
class Card:
    """A card's figures, dense rates, by its maker.

    Attributes:
        key: Name in the table and on the command line.
        name: The maker's name.
        memory_gib: Nominal memory.
        memory_bandwidth_gb_s: 10^9 bytes a second.
        bf16_tflops: Tensor rate with fp32 accumulation; None where the card has no bf16.
        fp16_tflops: The same in fp16; None without tensor cores.
        fp32_tflops: Rate outside the tensor cores.
        tdp_w: Board power.
        compute_capability: Such as "8.9".
        source: Where the figures come from.
        link: Key of what joins cards of this kind in one host, in `links`; None for unknown.
    """

    key: str
    name: str
    memory_gib: float
    memory_bandwidth_gb_s: float
    bf16_tflops: float | None
    fp16_tflops: float | None
    fp32_tflops: float
    tdp_w: float
    compute_capability: str
    source: str
    link: str | None = None

    @property
    def memory_bytes(self) -> int:
        """Nominal memory in bytes."""
        return int(self.memory_gib * GIB)

    def machine(self) -> Machine:
        """Return the card as a machine that is not here."""
        return Machine(
            kind="card",
            name=self.name,
            memory_bytes=self.memory_bytes,
            capability=self.compute_capability,
        )


@dataclass(frozen=True, kw_only=True)
class Link:
    """What joins cards in one host.

    Attributes:
        name: For people.
        gb_s: 10^9 bytes a second, one way, by its makers.
        source: Where the figure comes from.
    """

    name: str
    gb_s: float
    source: str


@cache
def links() -> dict[str, Link]:
    """Return the links by key."""
    return {key: Link(**figures) for key, figures in _table()["links"].items()}


@cache
def _table() -> dict[str, Any]:
    """Return the file of cards and links."""
    text = (resources.files(__package__) / "cards.json").read_text("utf-8")
    table: dict[str, Any] = json.loads(text)
    return table


@cache
def cards() -> dict[str, Card]:
    """Return the table by key."""
    return {key: Card(key=key, **figures) for key, figures in _table()["cards"].items()}


def find_card(name: str) -> Card:
    """Return a card by key or by the maker's name, or the first whose key begins with the name.

    Raises:
        UsageError: The table has no such card; the closest ones are named.
    """
    table = cards()
    key = _simple(name)
    for card in table.values():
        if key in (_simple(card.key), _simple(card.name)):
            return card
    for card in table.values():
        if key and not key.isdigit() and _simple(card.key).startswith(key):
            return card
    # As drivers write it: "Tesla T4", "NVIDIA H100 80GB HBM3".
    for card in sorted(table.values(), key=lambda card: -len(card.key)):
        if key.startswith(_simple(card.key)):
            return card
    close = difflib.get_close_matches(name.lower(), table, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}?" if close else "see `lora-advisor doctor --cards`."
    raise UsageError(f"`--gpu` must name a card of the table, but got {name!r}; {hint}")


def card_of(machine: Machine) -> Card | None:
    """Return the table's card for a machine that is here; None if it has none."""
    known = _simple(machine.name)
    for card in cards().values():
        if _simple(card.name) == known:
            return card
    best = [card for card in cards().values() if all(word in known for word in _words(card.key))]
    near = [card for card in best if abs(card.memory_bytes / machine.memory_bytes - 1) < 0.15]
    return max(near, key=lambda card: len(card.key)) if near else None


def _simple(name: str) -> str:
    text = name.lower()
    for maker in ("nvidia", "geforce", "tesla", "quadro"):
        text = text.replace(maker, "")
    return "".join(letter for letter in text if letter.isalnum())


def _words(key: str) -> list[str]:
    return [word for word in key.split("-") if not word.endswith("gb")]
