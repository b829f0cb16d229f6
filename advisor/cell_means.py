"""What each configuration reaches, freed of what a whole repeat had in common.

    log(tokens/s) = configuration + repeat + residual

The residual is how far two runs of one configuration lie apart, in the same repeat of the bench.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora_advisor.advisor.effects import Estimate, Observation, half_width
from lora_advisor.advisor.effects_model import Array, coding, is_estimable

Levels = tuple[str, ...]


@dataclass(frozen=True)
class CellMeans:
    """The fitted means.

    Attributes:
        cells: The configurations that ran, in the order of the first columns.
        residual: Standard deviation of the residual in log tokens/s; None where nothing ran twice.
        freedom: Its degrees of freedom.
    """

    cells: tuple[Levels, ...]
    residual: float | None
    freedom: int
    matrix: Array
    coefficients: Array

    @classmethod
    def of(cls, observations: Sequence[Observation]) -> CellMeans:
        """Fit the means of all runs that count; there must be one."""
        cells = tuple(sorted({seen.levels for seen in observations}))
        unit = dict(zip(cells, np.eye(len(cells)), strict=True))
        blocks = coding(sorted({seen.block for seen in observations}))
        matrix = np.array([[*unit[o.levels], *blocks[o.block]] for o in observations])
        y = np.log([o.values["tokens_per_s"] for o in observations])
        coefficients: Array = np.asarray(np.linalg.pinv(matrix) @ y, dtype=np.float64)
        freedom = len(y) - int(np.linalg.matrix_rank(matrix))
        squares = float(((y - matrix @ coefficients) ** 2).sum())
        residual = math.sqrt(squares / freedom) if freedom else None
        return cls(cells, residual, freedom, matrix, coefficients)

    def ratio(self, start: Levels, end: Levels) -> Estimate | None:
        """Return how many times the tokens/s of one configuration another reaches, if both ran."""
        if start not in self.cells or end not in self.cells:
            return None
        row = np.zeros(self.matrix.shape[1])
        row[self.cells.index(end)] += 1
        row[self.cells.index(start)] -= 1
        if not is_estimable(row, self.matrix):
            return None
        half = None
        if self.residual is not None:
            inverse = np.linalg.pinv(self.matrix)
            half = half_width(self.residual**2 * float(((row @ inverse) ** 2).sum()), self.freedom)
        return Estimate.of_log(float(row @ self.coefficients), half)
