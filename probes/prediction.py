"""A number with its error, and how it is known."""

from __future__ import annotations

from dataclasses import dataclass

#: The ladder of evidence, weakest first.
EVIDENCE = ("traced", "probed elsewhere", "probed", "proved")


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value and the range it lies in nine times of ten.

    The unit is named by the field that holds the interval.
    """

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> Interval:
        """Return it in another unit."""
        return Interval(value=self.value * factor, low=self.low * factor, high=self.high * factor)

    def reciprocal(self, amount: float) -> Interval:
        """Return `amount` per unit of it."""
        return Interval(value=amount / self.value, low=amount / self.high, high=amount / self.low)


@dataclass(frozen=True, kw_only=True)
class MemoryPrediction:
    """Three figures of one run's memory, in bytes, and what they are made of.

    Attributes:
        allocated_bytes: Peak of live tensors.
        reserved_bytes: Peak held by the caching allocator without a cap.
        process_bytes: The same with the CUDA context.
        process_upper_bytes: One-sided bound on `process_bytes`.
        needed_bytes: Smallest cap of the allocator under which the run survives by giving back
            cached memory.
        instant: Where in the step the peak lies.
        components: Bytes at that instant by owner; they sum to `allocated_bytes`.
        phases: Peak of live tensors in each stage: load, forward, loss, backward, optimizer.
        evidence: One of EVIDENCE.
    """

    allocated_bytes: int
    reserved_bytes: int
    process_bytes: int
    process_upper_bytes: int
    needed_bytes: int
    instant: str
    components: dict[str, int]
    phases: dict[str, int]
    evidence: str


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What one configuration is expected to need and to reach.

    Attributes:
        memory: Its memory.
        verdict: "fits", "does not fit" or "uncertain" for the budget it was asked for.
        step_s: Seconds of one optimizer step; None where no card is named.
        tokens_per_s: Tokens (padding included) per second; None likewise.
        evidence: One of EVIDENCE, the weaker of memory's and time's.
        joules_per_token: Energy of a token, padding included; None where nothing is known of it.
        energy_source: "probed", or "board power": no more than the power limit times the time.
    """

    memory: MemoryPrediction
    verdict: str
    step_s: Interval | None
    tokens_per_s: Interval | None
    evidence: str
    joules_per_token: Interval | None = None
    energy_source: str | None = None
