"""Time the replays of a CUDA graph, for benchmarks of single products."""

from __future__ import annotations

import torch


def replay_times(graph: torch.cuda.CUDAGraph, count: int) -> list[float]:
    """Return the microseconds of each of `count` replays, by the device's own events."""
    times = []
    for _ in range(count):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1000)
    return times
