"""From a trace's work, and the probes there are, to the time of a step.

A step takes as long as the slower of two: the host, which issues the kernels one after the other,
and the device, which runs them. The device's time is the sum of what its matrix products, its
attention kernels and all other kernels need (design.md, "Throughput"; the additive form fits
published ladders best, facts in docs/throughput-model.md). Without probes the coefficients are
those of a roofline; probes draw them to what this card and stack do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lora_advisor.probes.cards import Card
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.events import Work
from lora_advisor.probes.prediction import Interval

#: Share of the card's peak that the matrix products of a step reach, the small ones of the adapters
#: among them, fitted together with the two below to 26 recorded steps of an H100 (median error
#: 12 %; 24 published steps of a T4, which throttles, come out 28 % too fast). A large product alone
#: reaches 0.8: 790 of 989 TFLOP/s for 8192 x 8192.
_MATMUL_SHARE = 0.5
#: Share of the peak that flash attention reaches forward and backward together
#: (FlashAttention-2, arXiv 2307.08691, figure 6: 50 to 73 % of an A100's peak).
_ATTENTION_SHARE = 0.5
#: Share of the bandwidth that all other kernels reach, fitted with it (a large copy alone reaches
#: 0.9: 3.0 of 3.35 TB/s on an H100).
_BANDWIDTH_SHARE = 0.5
#: Seconds for the host to issue one kernel through PyTorch's autograd and modules: a step of 9
#: thousand kernels has a floor of 0.45 to 0.5 s on the recorded H100 machine.
_LAUNCH_S = 5e-5
#: What compiling the decoder layers leaves of the launches and of the bytes moved, before a probe
#: tells: Inductor fuses the elementwise kernels of a layer.
_COMPILED_LAUNCHES = 0.4
_COMPILED_BYTES = 0.2
#: One-sided half-width of an interval in log time, for a roofline without probes and for a model
#: with probes before its own residuals are known; benchmarks/results/throughput_accuracy.json.
_ROOFLINE_SPREAD = 0.6
_FITTED_TERMS = 3
_PROBED_SPREAD = 0.15


@dataclass(frozen=True, kw_only=True)
class Observation:
    """A measured step: what it did and how long it took."""

    config: RunConfig
    work: Work
    step_s: float


@dataclass(frozen=True)
class ThroughputModel:
    """Seconds of a step from its work.

    Attributes:
        seconds: Seconds per unit of each term of `terms`, host first; see `_prior`.
        spread: Half-width of the interval in log time.
        probes: Number of probes behind the coefficients.
        compiled_seconds: The same for compiled layers.
    """

    seconds: tuple[float, float, float, float]
    compiled_seconds: tuple[float, float, float, float]
    spread: float
    probes: int = 0

    @classmethod
    def roofline(cls, card: Card, precision: str) -> ThroughputModel:
        """Return the model of a card that was never measured."""
        plain = _prior(card, precision)
        return cls(plain, _compiled(plain), _ROOFLINE_SPREAD)

    @classmethod
    def fit(cls, card: Card | None, observations: Sequence[Observation]) -> ThroughputModel:
        """Draw a roofline's coefficients to what probes measured.

        Args:
            card: The card, if the table has it; otherwise the probes alone decide.
            observations: What the probes measured; at least one.
        """
        precision = observations[0].config.precision
        prior = _prior(card, precision) if card else _prior_from(observations)
        plain = [o for o in observations if o.config.compile == "off"]
        compiled = [o for o in observations if o.config.compile != "off"]
        seconds, left = _draw(prior, plain)
        compiled_seconds, compiled_left = _draw(_compiled(seconds), compiled)
        residuals = left + compiled_left
        weight = len(residuals) / (len(residuals) + 3)
        # 1.65 standard deviations hold nine of ten; the coefficients took degrees of freedom.
        free = max(1, len(residuals) - _FITTED_TERMS)
        own = 1.65 * math.sqrt(sum(r * r for r in residuals) / free)
        spread = weight * own + (1 - weight) * (_PROBED_SPREAD if residuals else _ROOFLINE_SPREAD)
        return cls(seconds, compiled_seconds, spread, len(observations))

    def step(self, config: RunConfig, work: Work) -> Interval:
        """Return the seconds of one optimizer step."""
        seconds = self.seconds if config.compile == "off" else self.compiled_seconds
        value = _step_s(seconds, work)
        return Interval(
            value=value, low=value * math.exp(-self.spread), high=value * math.exp(self.spread)
        )

    def tokens_per_s(self, config: RunConfig, work: Work) -> Interval:
        """Return the tokens (padding included) per second."""
        step = self.step(config, work)
        tokens = config.tokens_per_step
        return Interval(value=tokens / step.value, low=tokens / step.high, high=tokens / step.low)


def _terms(work: Work) -> tuple[float, float, float, float]:
    return (work.launches, work.matmul_flops, work.attention_flops, work.bytes_moved)


def _step_s(seconds: Sequence[float], work: Work) -> float:
    host, *device = (s * amount for s, amount in zip(seconds, _terms(work), strict=True))
    return max(host, sum(device))


def _prior(card: Card, precision: str) -> tuple[float, float, float, float]:
    rate = {"bf16": card.bf16_tflops, "fp16": card.fp16_tflops, "fp32": None}[precision]
    flops = (rate or card.fp32_tflops) * 1e12
    bandwidth = card.memory_bandwidth_gb_s * 1e9
    return (
        _LAUNCH_S,
        1 / (flops * _MATMUL_SHARE),
        1 / (flops * _ATTENTION_SHARE),
        1 / (bandwidth * _BANDWIDTH_SHARE),
    )


def _prior_from(observations: Sequence[Observation]) -> tuple[float, float, float, float]:
    """Return a roofline for a device of unknown figures: 20 flops a byte, scaled to the probes."""
    shape = (0.0, 1.0, 2.0, 20.0)
    ratios = [o.step_s / _step_s(shape, o.work) for o in observations]
    scale = sorted(ratios)[len(ratios) // 2]
    return (_LAUNCH_S, scale * shape[1], scale * shape[2], scale * shape[3])


def _compiled(plain: Sequence[float]) -> tuple[float, float, float, float]:
    return (
        plain[0] * _COMPILED_LAUNCHES,
        plain[1],
        plain[2],
        plain[3] * _COMPILED_BYTES,
    )


def _draw(
    prior: Sequence[float], observations: Sequence[Observation]
) -> tuple[tuple[float, float, float, float], list[float]]:
    """Draw coefficients to observations; return them and the residuals in log time.

    Terms are scaled so that the prior's coefficients are 1. Each observation says something only
    of the side (host or device) that bounds it; which one that is follows from the coefficients,
    so the two are settled in turns.
    """
    if not observations:
        return (prior[0], prior[1], prior[2], prior[3]), []
    import numpy
    from sklearn.linear_model import LinearRegression

    scaled = numpy.array(
        [[p * t for p, t in zip(prior, _terms(o.work), strict=True)] for o in observations]
    )
    times = numpy.array([o.step_s for o in observations])
    factors = numpy.ones(4)
    for _ in range(20):
        host = scaled[:, 0] * factors[0]
        device = scaled[:, 1:] @ factors[1:]
        bound_by_host = host > device
        before = factors.copy()
        for columns, rows in (([0], bound_by_host), ([1, 2, 3], ~bound_by_host)):
            # Relative errors (rows over their time), and one faint observation of each factor at
            # its prior, so that a term that no probe speaks of keeps it.
            inputs = numpy.vstack(
                [scaled[rows][:, columns] / times[rows, None], 0.3 * numpy.eye(len(columns))]
            )
            target = numpy.concatenate(
                [numpy.ones(int(rows.sum())), 0.3 * numpy.ones(len(columns))]
            )
            model = LinearRegression(fit_intercept=False, positive=True).fit(inputs, target)
            factors[columns] = numpy.maximum(model.coef_, 0.05)
        if numpy.allclose(before, factors, rtol=1e-4):
            break
    fitted = tuple(float(p * f) for p, f in zip(prior, factors, strict=True))
    seconds = (fitted[0], fitted[1], fitted[2], fitted[3])
    residuals = [math.log(o.step_s / _step_s(seconds, o.work)) for o in observations]
    return seconds, residuals
