"""What a trace comes to on a card's allocator, before anything is learnt from probes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TracedMemory:
    """Figures of a replayed trace, in bytes.

    Attributes:
        allocated_bytes: Peak of live tensors.
        reserved_bytes: Peak of the caching allocator without a cap.
        needed_bytes: Smallest cap the run survives, as far as it was worth finding out.
        instant: Where the peak lies.
        components: Bytes at the peak by owner.
        phases: Peak of live tensors in each stage of the step: load, forward, loss, backward,
            optimizer.
        least: Whether the figures are lower bounds, which sufficed to see that it does not fit.
    """

    allocated_bytes: int
    reserved_bytes: int
    needed_bytes: int
    instant: str
    components: Mapping[str, int]
    phases: Mapping[str, int]
    least: bool = False
