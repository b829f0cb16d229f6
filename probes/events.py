"""What a trace is made of: allocations, releases and work, each with its place in the step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PHASES = ("load", "forward", "backward", "optimizer")


@dataclass(frozen=True, slots=True)
class Event:
    """One allocation or release; with size 0, the allocator's cache is given back.

    Attributes:
        block: Number of the storage, from 1; a release carries the number of its allocation.
        size: Bytes asked for; negative for a release.
        phase: One of PHASES.
        layer: Decoder layer whose forward or backward pass runs; -1 outside of them.
    """

    block: int
    size: int
    phase: str
    layer: int = -1


@dataclass(frozen=True, slots=True)
class Work:
    """What a phase asks of the device and of the host, summed over one step.

    Attributes:
        launches: Kernels launched.
        matmul_flops: Floating-point operations of matrix products in the precision of the step.
        attention_flops: Those of the attention kernels.
        bytes_moved: Bytes read and written by all other kernels.
    """

    launches: float = 0.0
    matmul_flops: float = 0.0
    attention_flops: float = 0.0
    bytes_moved: float = 0.0

    def __add__(self, other: Work) -> Work:
        """Add term by term."""
        return Work(
            self.launches + other.launches,
            self.matmul_flops + other.matmul_flops,
            self.attention_flops + other.attention_flops,
            self.bytes_moved + other.bytes_moved,
        )

    def times(self, factor: float) -> Work:
        """Multiply term by term."""
        return Work(
            self.launches * factor,
            self.matmul_flops * factor,
            self.attention_flops * factor,
            self.bytes_moved * factor,
        )


@dataclass(frozen=True)
class Trace:
    """What one training step allocates and computes.

    Attributes:
        events: Allocations and releases in order: loading, two steps.
        owners: Owner of each block that is alive when the steps end, by block number.
        layer_of: Decoder layer of each of these blocks that belongs to one.
        work: Work of the last step by phase and decoder layer (-1 outside of them).
        trainable: Number of trained parameters.
        layer_trainable: Those of each decoder layer.
        layer_loaded: Bytes of the first block, which is reserved for all weights, that are each
            decoder layer's.
    """

    events: tuple[Event, ...]
    owners: Mapping[int, str]
    layer_of: Mapping[int, int]
    work: Mapping[tuple[str, int], Work]
    trainable: int
    layer_trainable: tuple[int, ...]
    layer_loaded: tuple[int, ...]

    def total_work(self) -> Work:
        """Return the work of one step."""
        return sum(self.work.values(), Work())
