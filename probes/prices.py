"""What an hour of a card costs to rent: a dated list that comes with the package, or the user's."""

from __future__ import annotations

import datetime
import json
import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from lora_advisor.probes.cards import cards
from lora_advisor.probes.errors import MissingInputError, UsageError


@dataclass(frozen=True, kw_only=True)
class Price:
    """A card's price.

    Attributes:
        card: Its key in the card table.
        usd_per_hour: US dollars for an hour of one card.
        date: When it was that, as YYYY-MM-DD.
        source: Who said so.
    """

    card: str
    usd_per_hour: float
    date: str
    source: str


def read_prices(file: Path | None = None) -> tuple[Price, ...]:
    """Return the prices of a file; without a file those of the package.

    Raises:
        MissingInputError: There is no such file.
        UsageError: It is no list of prices; the first fault is named.
    """
    if file is None:
        return _prices((resources.files(__package__) / "prices.json").read_text("utf-8"), "bundled")
    try:
        text = file.read_text("utf-8")
    except FileNotFoundError:
        raise MissingInputError(
            f"`--prices` must name a file of prices, but `{file}` is not there."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise _fault(str(file), f"it cannot be read: {error}") from None
    return _prices(text, str(file))


def _prices(text: str, name: str) -> tuple[Price, ...]:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise _fault(name, f"it is no JSON: {error}") from None
    priced = data.get("cards") if isinstance(data, dict) else None
    if not isinstance(priced, dict) or not priced:
        raise _fault(name, "it has no object `cards` with a card in it")
    return tuple(_price(key, figures, name) for key, figures in priced.items())


def _price(key: str, figures: Any, name: str) -> Price:
    if key not in cards():
        raise _fault(name, f"`{key}` is no card of `lora-advisor doctor --cards`")
    if not isinstance(figures, dict):
        raise _fault(name, f"`{key}` has {figures!r} where an object must be")
    usd, date, source = (figures.get(field) for field in ("usd_per_hour", "date", "source"))
    if isinstance(usd, bool) or not isinstance(usd, int | float) or not 0 < usd < math.inf:
        raise _fault(name, f"the `usd_per_hour` of `{key}` is {usd!r}, no number above 0")
    try:
        datetime.date.fromisoformat(date)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise _fault(name, f"the `date` of `{key}` is {date!r}, not YYYY-MM-DD") from None
    if not isinstance(source, str) or not source.strip():
        raise _fault(name, f"the `source` of `{key}` is {source!r}, not who said so")
    return Price(card=key, usd_per_hour=float(usd), date=str(date), source=source)


def _fault(name: str, what: str) -> UsageError:
    return UsageError(
        f"`--prices` must name a list of prices, but {what}, in `{name}`; such a list is "
        '{"cards": {"rtx-4090": {"usd_per_hour": 0.4, "date": "2026-11-25", "source": "mine"}}}.'
    )
