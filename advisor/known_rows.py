"""Rows that the base model knows by heart: they teach nothing, and a hold-out of them proves less.

A row whose answer has a perplexity below the threshold is flagged and reported. It is trained on
all the same, unless the user has it dropped.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_advisor.advisor.likelihood import RowLosses
from lora_advisor.probes.errors import DataError

#: Below this perplexity a row is flagged: the model then gives the right token more than a third
#: of its belief, in the geometric mean over the answer.
THRESHOLD = 3.0

#: Rows looked at where the user names no number: a share of one in two is then known to within
#: 4 points (95 %), whatever the size of the data.
SAMPLE_ROWS = 512

#: Why pairs are not looked at.
NO_KNOWN_PAIRS = "a pair is learnt from the difference of its answers, known by heart or not"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a row stands in the user's data.

    Attributes:
        file: The file's name.
        line: Line or number of the row in it.
        piece: Which piece of it, from 1 on, where it became several; None where it did not.
    """

    file: str
    line: int
    piece: int | None = None

    def to_json(self) -> dict[str, str | int]:
        """Return the JSON form."""
        place: dict[str, str | int] = {"file": self.file, "line": self.line}
        return place if self.piece is None else {**place, "piece": self.piece}


@dataclass(frozen=True, kw_only=True)
class KnownRows:
    """What the look at the training rows came to.

    Attributes:
        checked: Rows looked at: a random sample, or all.
        flagged: Those whose perplexity under the base model is below the threshold.
        share: `flagged` of `checked`.
        threshold: The threshold.
        dropped: Rows left out of the training for it.
        file: The list of the flagged rows, each with file, line and perplexity.
    """

    checked: int
    flagged: int
    share: float
    threshold: float
    dropped: int
    file: str


def rows_to_check(rows: int, wanted: int | None, *, all_of_them: bool, seed: int) -> list[int]:
    """Return the numbers of the rows to look at, in order.

    Args:
        rows: Training rows.
        wanted: How many the user asks for; None for `SAMPLE_ROWS`.
        all_of_them: Whether None means all: where what is flagged is dropped.
        seed: Of the sample.
    """
    count = min(rows, (rows if all_of_them else SAMPLE_ROWS) if wanted is None else wanted)
    return sorted(random.Random(seed).sample(range(rows), count))


def flagged(checked: Sequence[int], losses: RowLosses) -> dict[int, float]:
    """Return the perplexity of each row that is flagged, by its number."""
    perplexities = (math.exp(min(nats, 700.0)) for nats in losses.nats)
    return {
        row: perplexity
        for row, perplexity in zip(checked, perplexities, strict=True)
        if perplexity < THRESHOLD
    }


def write_flagged(file: Path, found: dict[int, float], places: Sequence[Place]) -> None:
    """Write the flagged rows, a JSON object a line."""
    lines = (
        json.dumps({**places[row].to_json(), "perplexity": round(value, 4)})
        for row, value in found.items()
    )
    beside = file.with_name(f".{file.name}.new")
    beside.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    beside.replace(file)


def check_some_left(rows: int, dropped: int) -> None:
    """Refuse to train on nothing.

    Raises:
        DataError: Every row was dropped.
    """
    if dropped >= rows:
        raise DataError(
            f"the data must have rows that the model does not know by heart, but all {rows} have a "
            f"perplexity below {THRESHOLD:g}; bring other rows, or train without --drop-known."
        )
