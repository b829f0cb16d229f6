"""From a trace's work, and the probes there are, to the time of a step.

A step takes as long as the slower of two: the host, which issues the kernels one after the other,
and the device, which runs them (design.md, "Throughput"). The host's time is a sum over launches,
each at the price of who issues it; the device's is what its matrix products, its attention kernels
and the bytes of all other kernels need, and a little for each kernel. These coefficients are shared
by all configurations. Without probes they are those of a roofline; probes draw them to what this
card, host and stack do, and what they leave unexplained is learnt per arm by a Gaussian process:
close where something similar was measured, wide elsewhere.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lora_advisor.models.residuals import Residuals
from lora_advisor.probes.cards import Card
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.events import Work
from lora_advisor.probes.prediction import Interval

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Seconds the host needs for a micro-batch (data, logging, clipping), an operator that Python code
#: calls, a kernel that the autograd engine launches, one with Python code of its own, one of a
#: compiled program, one there that calls Python, and a tensor that passes a hook. Their ratios are
#: fitted to the recorded steps of two H100 hosts (tests/recordings/regret of Qwen2.5-1.5B,
#: h100_work.json), which need 1.4 times as long; hosts differ by a factor of 2 either way.
_HOST_S = (0.0047, 1.4e-5, 1.1e-5, 9.1e-5, 1.2e-5, 4.9e-5, 1.1e-5)
#: Shares of the card's peaks that matrix products reach in 16 and in 32 bits, then attention:
#: flash or cuDNN, memory-efficient, in 32 bits; and of its bandwidth that all other kernels reach.
#: Then the seconds of a kernel beside what it computes.
_SHARES = (0.55, 0.9, 0.15, 0.12, 0.15)
_BANDWIDTH_SHARE = 0.65
_KERNEL_S = 2.2e-6
#: How the two combine: a norm between their maximum and their sum, for where both are as long each
#: waits for the other some of the time. It and the shares were chosen so that steps are ranked best
#: on every card of benchmarks/results/published_throughput.json and of the H100's records. Probes
#: draw it to what this host and card do; the standard deviation is that of its logarithm.
_NORM = 1.77
_NORM_PRIOR = 0.8

#: Standard deviations, in log time, of what no probe has spoken of: how far a whole side of a host
#: or a card strays from the roofline, and one of its coefficients from the others.
_HOST_PRIOR, _DEVICE_PRIOR = 0.5, 0.4
_TERM_PRIOR = 0.2
#: How far a measured step strays: the host's part more than the device's.
_HOST_NOISE, _DEVICE_NOISE = 0.03, 0.01
#: How far the host's part strays from one process to the next, in log time: what an interval allows
#: for besides. With it nine of ten steps that six plans' probes had not told of lay within theirs
#: (benchmarks/results/regret.json: a quiet host, and one whose steps varied by a fifth).
_PROCESS_NOISE = 0.15
#: Nine of ten lie within this many standard deviations.
NINE_OF_TEN = 1.645


@dataclass(frozen=True, kw_only=True)
class Observation:
    """A measured step: what it did and how long it took."""

    config: RunConfig
    work: Work
    step_s: float


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Time of one optimizer step.

    Attributes:
        host: Logarithm of the seconds that the host needs.
        host_deviation: Standard deviation of what is known of it by itself.
        device: The same of the device.
        device_deviation: Likewise.
        total_deviation: That of the logarithm of both together, where probes bound it: they tell
            the sum better than its parts. None where only the parts are known.
        noise: How far a measurement of one and the same step strays, from process to process.
        norm: How the two combine.
    """

    host: float
    host_deviation: float
    device: float
    device_deviation: float
    total_deviation: float | None = None
    noise: float = 0.0
    norm: float = _NORM

    @property
    def value(self) -> float:
        """The most likely time in seconds."""
        return math.exp(_join(self.host, self.device, self.norm))

    def quantile(self, deviations: float) -> float:
        """Return the time that lies this many standard deviations above the most likely."""
        if self.total_deviation is not None:
            return self.value * math.exp(deviations * self.total_deviation)
        return math.exp(
            _join(
                self.host + deviations * self.host_deviation,
                self.device + deviations * self.device_deviation,
                self.norm,
            )
        )

    @property
    def deviation(self) -> float:
        """Standard deviation of the logarithm of the time, where it lies."""
        return math.log(self.quantile(1.0) / self.value)

    @property
    def interval(self) -> Interval:
        """The time in seconds; nine of ten measurements lie within."""
        if self.total_deviation is not None:
            wide = math.exp(NINE_OF_TEN * math.hypot(self.total_deviation, self.noise))
            return Interval(value=self.value, low=self.value / wide, high=self.value * wide)
        return Interval(
            value=self.value,
            low=self.quantile(-NINE_OF_TEN),
            high=self.quantile(NINE_OF_TEN),
        )

    @property
    def is_host_bound(self) -> bool:
        """Whether the device waits for the host."""
        return self.host > self.device


@dataclass(frozen=True)
class ThroughputModel:
    """Seconds of a step from its work.

    Attributes:
        host: Seconds per unit of each of the host's terms.
        device: Those of the device's.
        left: What the coefficients leave unexplained, of host and device; None without probes.
        deviations: Standard deviations of both sides where nothing similar was measured.
        probes: Number of probes behind them.
        covariance: Of the logarithms of both sides' scales, of all coefficients beside them and of
            the norm, as the probes leave it; None without probes.
        norm: How both sides combine.
        slower: How many times a product takes as long in a precision as in bf16.
    """

    host: tuple[float, ...]
    device: tuple[float, ...]
    left: tuple[Residuals, Residuals] | None = None
    deviations: tuple[float, float] = (_HOST_PRIOR, _DEVICE_PRIOR)
    probes: int = 0
    covariance: tuple[tuple[float, ...], ...] | None = None
    norm: float = _NORM
    slower: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def roofline(cls, card: Card) -> ThroughputModel:
        """Return the model of a card that was never measured."""
        return cls(_HOST_S, _device_prior(card), slower=_slower(card))

    @classmethod
    def fit(cls, card: Card | None, observations: Sequence[Observation]) -> ThroughputModel:
        """Draw a roofline's coefficients to what probes measured.

        Args:
            card: The card, if the table has it; otherwise the probes alone decide.
            observations: What the probes measured; at least one.
        """
        start = cls(
            _HOST_S,
            _device_prior(card) if card else _device_guess(observations),
            slower=_slower(card) if card else {},
        )
        fitted = _drawn(start, observations, known=card is not None)
        sides: list[list[tuple[RunConfig, float]]] = [[], []]
        for seen in observations:
            host, device = fitted._sides(seen.config, seen.work)
            side = 0 if host > device else 1
            shares = _leverage(host, device, fitted.norm)
            # The longer side is told the whole difference: what moves it by as much moves the step.
            left = (math.log(seen.step_s) - _join(host, device, fitted.norm)) / shares[side]
            sides[side].append((seen.config, left))
        residuals = (
            Residuals.fit(sides[0], noise=_HOST_NOISE),
            Residuals.fit(sides[1], noise=_DEVICE_NOISE),
        )
        return dataclasses.replace(fitted, left=residuals, probes=len(observations))

    def time(self, config: RunConfig, work: Work) -> StepTime:
        """Return the time of one optimizer step with its uncertainty."""
        host, device = self._sides(config, work)
        deviations = list(self.deviations)
        if self.left is not None:
            for side, residuals in enumerate(self.left):
                if residuals.count:
                    shift, deviations[side] = residuals.at(config)
                    host, device = (host + shift, device) if side == 0 else (host, device + shift)
        return StepTime(
            host=host,
            host_deviation=deviations[0],
            device=device,
            device_deviation=deviations[1],
            total_deviation=self._total_deviation(config, work, deviations),
            noise=_PROCESS_NOISE * _leverage(host, device, self.norm)[0],
            norm=self.norm,
        )

    def _total_deviation(
        self, config: RunConfig, work: Work, deviations: Sequence[float]
    ) -> float | None:
        """Return how far the step strays: its coefficients, and what is left per arm."""
        if self.covariance is None or self.left is None:
            return None
        import numpy

        host, device = self._sides(config, work)
        shares = _leverage(host, device, self.norm)
        amounts = (
            host_terms(config, work),
            device_terms(work, self.slower.get(config.precision, 1.0)),
        )
        slopes = list(shares)
        for share, seconds, terms in zip(shares, (self.host, self.device), amounts, strict=True):
            parts = [s * n for s, n in zip(seconds, terms, strict=True)]
            slopes += [share * part / (sum(parts) or 1.0) for part in parts]
        by_norm = shares[0] * host + shares[1] * device - _join(host, device, self.norm)
        slope = numpy.array([*slopes, by_norm])
        variance = float(slope @ numpy.array(self.covariance) @ slope)
        for share, deviation, residuals in zip(shares, deviations, self.left, strict=True):
            if residuals.count:
                variance += (share * deviation) ** 2
        return math.sqrt(variance)

    def _sides(self, config: RunConfig, work: Work) -> tuple[float, float]:
        """Return the logarithms of the host's and the device's seconds."""
        host = sum(s * n for s, n in zip(self.host, host_terms(config, work), strict=True))
        terms = device_terms(work, self.slower.get(config.precision, 1.0))
        device = sum(s * n for s, n in zip(self.device, terms, strict=True))
        return math.log(max(host, 1e-9)), math.log(max(device, 1e-9))


def host_terms(config: RunConfig, work: Work) -> tuple[float, ...]:
    """Return how much a step asks of the host: micro-batches, and launches by who issues them."""
    return (
        float(config.accumulation),
        work.launches,
        work.engine_launches,
        work.custom_launches,
        work.compiled_launches,
        work.compiled_custom_launches,
        work.hooks,
    )


def device_terms(work: Work, slower: float) -> tuple[float, ...]:
    """Return how much a step asks of the device: FLOPs by kind, bytes, kernels.

    FLOPs in a precision that is slower than bf16 count that many times.
    """
    return (
        work.matmul_flops * slower,
        work.fp32_matmul_flops,
        work.attention_flops * slower,
        work.efficient_attention_flops * slower,
        work.fp32_attention_flops,
        work.bytes_moved,
        work.kernels,
    )


def _join(host: float, device: float, norm: float) -> float:
    """Return the logarithm of the time of a step from those of its two sides."""
    high, low = max(host, device), min(host, device)
    return high + math.log1p(math.exp(norm * (low - high))) / norm


def _slower(card: Card) -> dict[str, float]:
    rates = {"bf16": card.bf16_tflops, "fp16": card.fp16_tflops, "fp32": card.fp32_tflops}
    base = card.bf16_tflops or card.fp32_tflops
    # What a card does not multiply in, it computes in fp32.
    return {precision: base / (rate or card.fp32_tflops) for precision, rate in rates.items()}


def _leverage(host: float, device: float, norm: float) -> tuple[float, float]:
    """Return by how much the logarithm of a step's time moves with that of each side."""
    apart = max(-700.0, min(700.0, norm * (device - host)))
    share = 1 / (1 + math.exp(apart))
    return share, 1 - share


def _device_prior(card: Card) -> tuple[float, ...]:
    half, full = (card.bf16_tflops or card.fp32_tflops) * 1e12, card.fp32_tflops * 1e12
    bandwidth = card.memory_bandwidth_gb_s * 1e9
    rates = (half, full, half, half, full)
    return (
        *(1 / (rate * share) for rate, share in zip(rates, _SHARES, strict=True)),
        1 / (bandwidth * _BANDWIDTH_SHARE),
        _KERNEL_S,
    )


def _device_guess(observations: Sequence[Observation]) -> tuple[float, ...]:
    """Return a roofline for a device of unknown figures: 20 flops a byte, scaled to the probes."""
    shape = (1.0, 1.0, 2.0, 2.0, 2.0, 20.0, 0.0)
    ratios = [
        o.step_s / sum(s * n for s, n in zip(shape, device_terms(o.work, 1.0), strict=True))
        for o in observations
    ]
    scale = sorted(ratios)[len(ratios) // 2]
    return (*(scale * part for part in shape[:-1]), _KERNEL_S)


def _drawn(
    start: ThroughputModel, observations: Sequence[Observation], *, known: bool
) -> ThroughputModel:
    """Return the coefficients that are most probable given the roofline and the probes.

    Least squares in log time over factors of both sides as a whole and of each coefficient, each
    normal around 1 in its logarithm; an outlier counts for less (soft L1).
    """
    import numpy
    from scipy.optimize import least_squares

    host = numpy.array([host_terms(o.config, o.work) for o in observations])
    device = numpy.array(
        [device_terms(o.work, start.slower.get(o.config.precision, 1.0)) for o in observations]
    )
    times = numpy.log([o.step_s for o in observations])
    sides = ((host, numpy.array(start.host)), (device, numpy.array(start.device)))
    count = len(start.host) + len(start.device)
    # Of a device without figures the scale is the probes' own.
    wide = 2 * _DEVICE_PRIOR if known else 2.0
    prior = numpy.array([2 * _HOST_PRIOR, wide] + [_TERM_PRIOR] * count + [_NORM_PRIOR])
    noise = 2 * _HOST_NOISE

    def coefficients(logs: NDArray[numpy.float64]) -> list[NDArray[numpy.float64]]:
        split = 2 + len(start.host)
        parts = (logs[2:split], logs[split:-1])
        return [
            numpy.asarray(base * numpy.exp(whole + part))
            for (_, base), whole, part in zip(sides, logs[:2], parts, strict=True)
        ]

    def misfit(logs: NDArray[numpy.float64]) -> NDArray[numpy.float64]:
        both = [
            numpy.log(numpy.maximum(terms @ seconds, 1e-9))
            for (terms, _), seconds in zip(sides, coefficients(logs), strict=True)
        ]
        norm = _NORM * numpy.exp(logs[-1])
        joined = numpy.logaddexp(norm * both[0], norm * both[1]) / norm
        return numpy.concatenate([(joined - times) / noise, logs / prior])

    found = least_squares(misfit, numpy.zeros(3 + count), loss="soft_l1", f_scale=2.0)
    fitted = coefficients(found.x)
    # Laplace's approximation: the misfit's curvature at its least, prior included.
    covariance = numpy.linalg.inv(found.jac.T @ found.jac)
    return dataclasses.replace(
        start,
        host=tuple(map(float, fitted[0])),
        device=tuple(map(float, fitted[1])),
        covariance=tuple(tuple(map(float, row)) for row in covariance),
        norm=_NORM * math.exp(found.x[-1]),
    )
