"""All factors at once: a linear model of log tokens/s with interactions and repeats as blocks.

    log(tokens/s) = mean + block + main effects + effects of pairs of factors + residual

Least squares with sum-to-zero coding, so that a main effect is the mean over the levels of the
others. Its residual holds the scatter of the repeats and what three factors do together. Pairs of
factors of which some combination never ran are left out, and the largest ones while there are too
few runs to tell them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lora_advisor.advisor.effects import Estimate, Observation, half_width

Array = NDArray[np.float64]
L = TypeVar("L", bound=Hashable)

#: An interaction stays only while this many degrees of freedom are left for the residual.
_LEAST_FREEDOM = 3
_BLOCK = ("repeat",)


@dataclass(frozen=True, kw_only=True)
class Term:
    """One term of the model.

    Attributes:
        factors: Its factors, one or two; ("repeat",) for the blocks.
        freedom: Its degrees of freedom.
        span: How many times the tokens/s of its slowest level the fastest reaches; of two factors,
            by how much a combination lies off the product of its levels at most.
        p_value: Of "it does nothing" (F test); None without a residual.
    """

    factors: tuple[str, ...]
    freedom: int
    span: float
    p_value: float | None


@dataclass(frozen=True)
class _Columns:
    """A design matrix: where each term's columns are, and the coding of each factor."""

    matrix: Array
    places: Mapping[tuple[str, ...], slice]
    codes: Mapping[str, Mapping[Any, Array]]


@dataclass(frozen=True, kw_only=True)
class Model:
    """The fitted model.

    Attributes:
        terms: Its terms.
        left_out: Interactions it has not, and why.
        freedom: Degrees of freedom of the residual.
        residual: Standard deviation of the residual in log tokens/s; None without freedom.
    """

    terms: tuple[Term, ...]
    left_out: tuple[tuple[str, str], ...]
    freedom: int
    residual: float | None
    columns: _Columns
    coefficients: Array
    covariance: Array

    def effect(self, factor: str, level: str, against: str) -> Estimate | None:
        """Return the ratio of tokens/s of two levels, all levels of the others weighing alike.

        None where the runs cannot tell it.
        """
        codes = self.columns.codes.get(factor, {})
        if self.residual is None or level not in codes or against not in codes:
            return None
        row = np.zeros(self.columns.matrix.shape[1])
        row[self.columns.places[factor,]] = codes[level] - codes[against]
        if not is_estimable(row, self.columns.matrix):
            return None
        variance = self.residual**2 * float(row @ self.covariance @ row)
        half = half_width(variance, self.freedom)
        return Estimate.of_log(float(row @ self.coefficients), half)


def is_estimable(row: Array, matrix: Array) -> bool:
    """Whether the runs determine a combination of coefficients: it is a mix of their rows."""
    back = row @ np.linalg.pinv(matrix) @ matrix
    worst: float = np.abs(back - row).max()
    return worst < 1e-8


def fit_model(
    observations: Sequence[Observation], factors: Mapping[str, Sequence[str]]
) -> Model | None:
    """Return the model of all runs; None where nothing varied.

    Args:
        observations: The runs that count.
        factors: The levels of each factor, in the order of the observations' levels.
    """
    seen = _levels_seen(observations, factors)
    if not seen:
        return None
    position = {name: index for index, name in enumerate(factors)}
    pairs, left_out = _full_pairs(observations, seen, position)
    columns = _columns(observations, seen, position, pairs)
    while pairs and not _is_enough(columns.matrix):
        largest = max(pairs, key=lambda pair: math.prod(len(seen[name]) - 1 for name in pair))
        pairs = [pair for pair in pairs if pair != largest]
        left_out.append((" x ".join(largest), "too few runs to tell it"))
        columns = _columns(observations, seen, position, pairs)
    return _solve(observations, columns, left_out)


def _is_enough(matrix: Array) -> bool:
    rank = int(np.linalg.matrix_rank(matrix))
    return bool(rank == matrix.shape[1] and matrix.shape[0] - rank >= _LEAST_FREEDOM)


def _levels_seen(
    observations: Sequence[Observation], factors: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """Return the levels of each factor that ran, for those of which several did."""
    seen = {}
    for index, (name, levels) in enumerate(factors.items()):
        ran = {observation.levels[index] for observation in observations}
        kept = [level for level in levels if level in ran]
        if len(kept) > 1:
            seen[name] = kept
    return seen


def _full_pairs(
    observations: Sequence[Observation],
    seen: Mapping[str, Sequence[str]],
    position: Mapping[str, int],
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return the pairs of factors of which every combination ran, and why others are left out."""
    pairs, left_out = [], []
    for one, two in itertools.combinations(seen, 2):
        ran = {(o.levels[position[one]], o.levels[position[two]]) for o in observations}
        absent = [p for p in itertools.product(seen[one], seen[two]) if p not in ran]
        if absent:
            left_out.append((f"{one} x {two}", f"no run of {absent[0][0]} with {absent[0][1]}"))
        else:
            pairs.append((one, two))
    return pairs, left_out


def _columns(
    observations: Sequence[Observation],
    seen: Mapping[str, Sequence[str]],
    position: Mapping[str, int],
    pairs: Sequence[tuple[str, str]],
) -> _Columns:
    codes: dict[str, dict[Any, Array]] = {name: coding(levels) for name, levels in seen.items()}
    blocks = coding(sorted({observation.block for observation in observations}))
    codes[_BLOCK[0]] = blocks
    parts: dict[tuple[str, ...], Array] = {
        (): np.ones((len(observations), 1)),
        _BLOCK: np.array([blocks[observation.block] for observation in observations]),
    }
    for name in seen:
        parts[name,] = np.array([codes[name][o.levels[position[name]]] for o in observations])
    for one, two in pairs:
        left, right = parts[one,], parts[two,]
        parts[one, two] = (left[:, :, None] * right[:, None, :]).reshape(len(observations), -1)
    places, start = {}, 0
    for term, part in parts.items():
        places[term] = slice(start, start + part.shape[1])
        start += part.shape[1]
    return _Columns(np.hstack(list(parts.values())), places, codes)


def coding(levels: Sequence[L]) -> dict[L, Array]:
    """Return the sum-to-zero coding of levels: the last is minus the sum of the others."""
    unit = np.eye(len(levels) - 1)
    rows = np.vstack([unit, -np.ones((1, len(levels) - 1))])
    return dict(zip(levels, rows, strict=True))


def _solve(
    observations: Sequence[Observation], columns: _Columns, left_out: Sequence[tuple[str, str]]
) -> Model:
    y = np.log([observation.values["tokens_per_s"] for observation in observations])
    matrix = columns.matrix
    inverse = np.linalg.pinv(matrix)
    coefficients: Array = np.asarray(inverse @ y, dtype=np.float64)
    squares = _residual_squares(matrix, y)
    freedom = len(y) - int(np.linalg.matrix_rank(matrix))
    terms = []
    for term, place in columns.places.items():
        width = place.stop - place.start
        if not term or not width:
            continue
        kept = np.delete(matrix, np.arange(place.start, place.stop), axis=1)
        p_value = None
        if freedom and squares > 0:
            gained = max(0.0, _residual_squares(kept, y) - squares)
            p_value = float(stats.f.sf(gained / width / (squares / freedom), width, freedom))
        span = _span([columns.codes[name] for name in term], coefficients[place])
        terms.append(Term(factors=term, freedom=width, span=span, p_value=p_value))
    return Model(
        terms=tuple(terms),
        left_out=tuple(left_out),
        freedom=freedom,
        residual=math.sqrt(squares / freedom) if freedom else None,
        columns=columns,
        coefficients=coefficients,
        covariance=inverse @ inverse.T,
    )


def _span(codes: Sequence[Mapping[Any, Array]], coefficients: Array) -> float:
    """Return how far a term moves tokens/s, as a ratio."""
    rows = [np.array(list(code.values())) for code in codes]
    if len(rows) == 1:
        values = rows[0] @ coefficients
        return math.exp(float(values.max() - values.min()))
    return math.exp(float(np.abs(np.kron(rows[0], rows[1]) @ coefficients).max()))


def _residual_squares(matrix: Array, y: Array) -> float:
    return float(((y - matrix @ (np.linalg.pinv(matrix) @ y)) ** 2).sum())
