"""From the time of a step to the energy it takes.

A board draws one power whether it computes or waits for the host, and more while it computes. Both
are learnt from probes. Without any, all that is known is the board's power limit: its product with
the time is an upper bound, and said to be no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_advisor.models.throughput import NINE_OF_TEN, StepTime
from lora_advisor.probes.prediction import Interval

#: Share of the power that a board at work draws while it waits, before probes tell: an H100 draws
#: some 180 of 700 W where it waits for the host most of the time (tests/recordings/regret).
_WAITING_SHARE = 0.25
#: Weight of that guess against one probe, and how far energies stray from the fit.
_GUESS, _SPREAD = 0.3, 0.15
#: The least part of its limit that a board at work was seen to draw.
_LEAST_SHARE = 0.2


@dataclass(frozen=True)
class EnergyModel:
    """Joules of a step.

    Attributes:
        waiting_w: Power whatever the board does.
        computing_w: Power added while its kernels run.
        source: "probed", or "board power" where only the limit is known.
    """

    waiting_w: float
    computing_w: float
    source: str

    @classmethod
    def of_board(cls, limit_w: float) -> EnergyModel:
        """Return the approximation by the board's power limit."""
        return cls(limit_w, 0.0, "board power")

    @classmethod
    def fit(cls, observed: Sequence[tuple[StepTime, float, float]]) -> EnergyModel:
        """Learn from probes: predicted times, measured seconds and joules of a step."""
        import numpy
        from sklearn.linear_model import LinearRegression

        rows = numpy.array([[seconds, _busy(time, seconds)] for time, seconds, _ in observed])
        joules = numpy.array([joules for _, _, joules in observed])
        shares = numpy.array([_WAITING_SHARE, 1 - _WAITING_SHARE])
        power = numpy.median(joules / (rows @ shares))  # of a board that computes all the time
        guess = numpy.diag(_GUESS / (shares * power))
        model = LinearRegression(fit_intercept=False, positive=True).fit(
            numpy.vstack([rows / joules[:, None], guess]),
            numpy.concatenate([numpy.ones(len(rows)), [_GUESS, _GUESS]]),
        )
        waiting, computing = (float(value) for value in model.coef_)
        return cls(waiting, computing, "probed")

    def joules(self, time: StepTime) -> Interval:
        """Return the energy of a step."""
        if self.source == "board power":
            # What a board draws at most, all the time.
            least, most = time.quantile(-NINE_OF_TEN), time.quantile(NINE_OF_TEN)
            return Interval(
                value=self.waiting_w * time.value,
                low=self.waiting_w * least * _LEAST_SHARE,
                high=self.waiting_w * most,
            )
        value = self.waiting_w * time.value + self.computing_w * _busy(time, time.value)
        wide = 1 + _SPREAD + NINE_OF_TEN * time.deviation
        return Interval(value=value, low=value / wide, high=value * wide)


def _busy(time: StepTime, seconds: float) -> float:
    """Return the seconds in which the device computes."""
    import math

    return min(math.exp(time.device), seconds)
