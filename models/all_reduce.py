"""How long cards take to add up gradients and wait for each other, and what memory that needs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from lora_advisor.probes.prediction import Interval

MIB = 1024**2

#: DDP fills a first bucket of 1 MiB, then such of 25 MiB (torch/nn/parallel/distributed.py,
#: `bucket_cap_mb`; torch/distributed/__init__.py, `_DEFAULT_FIRST_BUCKET_BYTES`).
FIRST_BUCKET_BYTES, BUCKET_BYTES = MIB, 25 * MIB

#: Seconds of one pass of a small message from card to card: a kernel's launch and a crossing of the
#: link, as NCCL's tests print them for the smallest sizes (github.com/NVIDIA/nccl-tests,
#: doc/PERFORMANCE.md tells how; 10 to 30 us on one host).
_HOP_S = 2e-5

#: Share of a link's rate that is reached at worst: without access from card to card, as between
#: GeForce cards, all goes through the host's memory, there and back, and both cards share it.
_WORST_SHARE = 0.25

#: What NCCL holds on a card beside PyTorch's allocator, at most: buffers of 4 MiB (NCCL_BUFFSIZE)
#: to send and to receive for each of up to 32 channels, and half as much again for its other
#: protocols (NCCL's manual, "Environment Variables"). It was not measured here.
NCCL_BYTES = 384 * MIB


def all_reduce_s(gradient_bytes: int, gpus: int, link_gb_s: float) -> Interval:
    """Return the seconds that a step takes longer for its gradients' sum.

    A ring sends 2 (N - 1) / N times the gradients over each link. DDP begins with the first full
    bucket, while the backward pass goes on: at best only the last one is waited for, at worst all.

    Args:
        gradient_bytes: Of one card.
        gpus: N, at least 2.
        link_gb_s: 10^9 bytes a second, one way.
    """
    share = 2 * (gpus - 1) / gpus
    whole_s = share * gradient_bytes / (link_gb_s * 1e9)
    buckets = 1 + math.ceil(max(0, gradient_bytes - FIRST_BUCKET_BYTES) / BUCKET_BYTES)
    hops_s = 2 * (gpus - 1) * _HOP_S
    last_s = whole_s * min(1.0, BUCKET_BYTES / max(1, gradient_bytes)) / 2
    return Interval(
        value=whole_s + buckets * hops_s,
        low=last_s + hops_s,
        high=whole_s / _WORST_SHARE + 2 * buckets * hops_s,
    )


def waiting_s(times: Sequence[float], gpus: int) -> Interval | None:
    """Return the seconds that a step takes longer because the slowest card is waited for.

    The mean of the largest of N draws lies above that of one by their standard deviation times the
    integral of x N phi(x) Phi(x)^(N - 1) (the largest order statistic of a normal sample): 0.56 for
    two, 1.03 for four. That takes times as normal and each card as varying by itself. What slows
    one card of a host may slow all at the same time: at least, nobody waits.

    Args:
        times: Seconds of one card's steps.
        gpus: N.

    Returns:
        The interval; None of fewer than three steps.
    """
    if len(times) < 3:
        return None
    from scipy.stats import norm

    largest = norm.expect(lambda x: gpus * x * norm.cdf(x) ** (gpus - 1))
    value = float(statistics.stdev(times) * largest)
    return Interval(value=value, low=0.0, high=value)
