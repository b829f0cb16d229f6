"""What shared coefficients leave unexplained of measured times, learnt per arm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_advisor.probes import config as words
from lora_advisor.probes.config import RunConfig

if TYPE_CHECKING:
    from sklearn.gaussian_process import GaussianProcessRegressor

#: Correlation of what is unexplained of two configurations that differ in one knob only. What
#: changes the code that runs says little of the other way; what changes the optimizer, nearly all.
_ALIKE: dict[str, tuple[tuple[Any, ...], float]] = {
    "stage": (words.STAGES, 0.7),
    "trainer": (words.TRAINERS + words.FOREIGN_TRAINERS, 0.7),
    "method": (words.METHODS, 0.6),
    "attention": (words.ATTENTIONS, 0.5),
    "kernels": (words.KERNELS, 0.5),
    "adapter": (words.ADAPTERS, 0.7),
    "compile": (words.COMPILES, 0.5),
    "precision": (words.PRECISIONS, 0.8),
    "loss": (words.LOSSES, 0.8),
    "fp32_upcast": ((False, True), 0.8),
    "packing": ((False, True), 0.9),
    "quant_type": ((None, *words.QUANT_TYPES), 0.95),
    "optimizer": (words.OPTIMIZERS, 0.97),
    "allocator": (words.ALLOCATORS, 0.98),
    "embedding": (words.EMBEDDINGS, 0.95),
    "cuda_graph": (words.CUDA_GRAPHS, 0.7),
    "recompute": (words.RECOMPUTES, 0.9),
}
#: The same for every layer checkpointed or none, for twice the tokens in a micro-batch, and for
#: sequences twice as long.
_ALIKE_CHECKPOINTING, _ALIKE_TOKENS, _ALIKE_LENGTH = 0.7, 0.9, 0.9
#: Standard deviation, in log time, of what is unexplained. With it the intervals hold three of four
#: recorded H100 steps that the model did not see (tests/test_throughput.py, half tells half).
_AMPLITUDE = 0.12
#: How many times as far as is usual probes may stray, and the standard deviation of its logarithm
#: before they tell.
_STRAYING = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
_STRAYING_PRIOR = 0.35


@dataclass(frozen=True)
class Residuals:
    """A Gaussian process over configurations.

    Attributes:
        count: Number of observations.
        process: The process; None without observations.
    """

    count: int
    process: GaussianProcessRegressor | None

    @classmethod
    def fit(cls, seen: Sequence[tuple[RunConfig, float]], *, noise: float) -> Residuals:
        """Learn from configurations and what was unexplained of them, in log time.

        `noise` is how far probes usually stray; where these agree less, they are believed less.
        """
        if not seen:
            return cls(0, None)
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import RBF, ConstantKernel

        kernel = ConstantKernel(_AMPLITUDE**2, "fixed") * RBF(1.0, "fixed")
        places, left = [_place(config) for config, _ in seen], [left for _, left in seen]

        def straying(times: float) -> tuple[float, GaussianProcessRegressor]:
            process = GaussianProcessRegressor(kernel, alpha=(times * noise) ** 2, optimizer=None)
            process.fit(places, left)
            prior = (math.log(times) / _STRAYING_PRIOR) ** 2 / 2
            return process.log_marginal_likelihood_value_ - prior, process

        return cls(len(seen), max(map(straying, _STRAYING), key=lambda found: found[0])[1])

    def at(self, config: RunConfig) -> tuple[float, float]:
        """Return what to add to the log time of a configuration, and its standard deviation."""
        assert self.process is not None
        mean, deviation = self.process.predict([_place(config)], return_std=True)
        return float(mean[0]), float(deviation[0])


def _place(config: RunConfig) -> list[float]:
    """Return where a configuration lies: similar ones are near, by the correlations above."""
    recomputed = 0.0 if config.checkpoint_every is None else 1 / config.checkpoint_every
    place = [
        math.log2(config.tokens) * _distance(_ALIKE_TOKENS),
        math.log2(config.seq_len) * _distance(_ALIKE_LENGTH),
        recomputed * _distance(_ALIKE_CHECKPOINTING),
        float(config.checkpointing == "offload") * _distance(_ALIKE_CHECKPOINTING),
    ]
    for knob, (values, alike) in _ALIKE.items():
        # All corners of a simplex are as far from each other.
        corner = [0.0] * len(values)
        corner[values.index(getattr(config, knob))] = _distance(alike) / math.sqrt(2)
        place += corner
    return place


def _distance(correlation: float) -> float:
    """Return the distance at which a squared-exponential kernel of length 1 has a correlation."""
    return math.sqrt(-2 * math.log(correlation))
