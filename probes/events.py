"""What a trace is made of: allocations, releases and work, each with its place in the step."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from numpy.typing import NDArray

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

    Launches are told apart by who issues them, for that decides what they cost the host.

    Attributes:
        launches: Kernels that Python code launches through PyTorch's operators.
        engine_launches: Those of the autograd engine, which is C++.
        custom_launches: Calls of kernels with Python code of their own: Triton's, bitsandbytes'.
        compiled_launches: Those of a compiled program.
        compiled_custom_launches: Those among them that call Python: bitsandbytes' operators, an
            adapter's products.
        recorded_launches: Those of a CUDA graph, which the host starts as a whole.
        hooks: Tensors that pass a hook of what is saved for the backward pass, as activation
            checkpointing has them: when they are saved, saved anew, and asked for.
        matmul_flops: Floating-point operations of matrix products in 16 bits.
        fp32_matmul_flops: Those of products in 32 bits.
        attention_flops: Those of flash and cuDNN attention.
        efficient_attention_flops: Those of memory-efficient attention in 16 bits.
        fp32_attention_flops: Those of any attention kernel in 32 bits.
        bytes_moved: Bytes read and written by all other kernels, among them products with so thin
            a factor that reading the other one takes longer.
    """

    launches: float = 0.0
    engine_launches: float = 0.0
    custom_launches: float = 0.0
    compiled_launches: float = 0.0
    compiled_custom_launches: float = 0.0
    recorded_launches: float = 0.0
    hooks: float = 0.0
    matmul_flops: float = 0.0
    fp32_matmul_flops: float = 0.0
    attention_flops: float = 0.0
    efficient_attention_flops: float = 0.0
    fp32_attention_flops: float = 0.0
    bytes_moved: float = 0.0

    def __add__(self, other: Work) -> Work:
        """Add term by term."""
        pairs = zip(self.amounts(), other.amounts(), strict=True)
        return Work(*(mine + theirs for mine, theirs in pairs))

    def times(self, factor: float) -> Work:
        """Multiply term by term."""
        return Work(*(amount * factor for amount in self.amounts()))

    @property
    def kernels(self) -> float:
        """Kernels that run, whoever launches them."""
        return (
            self.launches
            + self.engine_launches
            + self.custom_launches
            + self.compiled_launches
            + self.compiled_custom_launches
            + self.recorded_launches
        )

    def amounts(self) -> tuple[float, ...]:
        """Return the terms in order."""
        amounts: tuple[float, ...] = _amounts(self)
        return amounts


_amounts = operator.attrgetter(*(field.name for field in dataclasses.fields(Work)))


@dataclass(frozen=True, eq=False)
class Trace:
    """What one training step allocates and computes.

    The events (loading, then two steps, in order) stand in four arrays, an entry each: their fields
    are those of Event, the phase as its number in PHASES.

    Attributes:
        blocks: int32.
        sizes: int64.
        phases: int8.
        layers: int16.
        owners: Owner of each block that is alive when the steps end, by block number.
        layer_of: Decoder layer of each of these blocks that belongs to one.
        work: Work of the last step by phase and decoder layer (-1 outside of them).
        trainable: Number of trained parameters.
        layer_trainable: Those of each decoder layer.
        layer_loaded: Bytes of the first block, which is reserved for all weights, that are each
            decoder layer's.
    """

    blocks: NDArray[Any]
    sizes: NDArray[Any]
    phases: NDArray[Any]
    layers: NDArray[Any]
    owners: Mapping[int, str]
    layer_of: Mapping[int, int]
    work: Mapping[tuple[str, int], Work]
    trainable: int
    layer_trainable: tuple[int, ...] = ()
    layer_loaded: tuple[int, ...] = ()

    @classmethod
    def of(cls, events: Iterable[Event], **rest: Any) -> Self:
        """Return the trace of a list of events; `rest` are the other fields."""
        import numpy

        numbers = {phase: number for number, phase in enumerate(PHASES)}
        rows = [(e.block, e.size, numbers[e.phase], e.layer) for e in events]
        table = numpy.array(rows, dtype=numpy.int64).reshape(-1, 4)
        kinds = (numpy.int32, numpy.int64, numpy.int8, numpy.int16)
        blocks, sizes, phases, layers = (table[:, i].astype(k) for i, k in enumerate(kinds))
        return cls(blocks=blocks, sizes=sizes, phases=phases, layers=layers, **rest)

    @cached_property
    def events(self) -> tuple[Event, ...]:
        """The events, one by one."""
        columns = (self.blocks, self.sizes, self.phases, self.layers)
        return tuple(
            Event(block, size, PHASES[phase], layer)
            for block, size, phase, layer in zip(*(c.tolist() for c in columns), strict=True)
        )

    def to_bytes(self) -> bytes:
        """Return the trace in a compact form, for a cache."""
        import json
        import zlib

        columns = (self.blocks, self.sizes, self.phases, self.layers)
        head = {
            "count": len(self.blocks),
            "owners": list(self.owners.items()),
            "layer_of": list(self.layer_of.items()),
            "work": [(*place, dataclasses.asdict(work)) for place, work in self.work.items()],
            "trainable": self.trainable,
        }
        text = json.dumps(head).encode()
        body = b"".join(column.tobytes() for column in columns)
        return zlib.compress(len(text).to_bytes(8, "little") + text + body, 1)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read what `to_bytes` wrote."""
        import json
        import zlib

        import numpy

        data = zlib.decompress(data)
        start = 8 + int.from_bytes(data[:8], "little")
        head = json.loads(data[8:start])
        columns = []
        for kind in (numpy.int32, numpy.int64, numpy.int8, numpy.int16):
            column = numpy.frombuffer(data, kind, head["count"], start)
            start += column.nbytes
            columns.append(column)
        blocks, sizes, phases, layers = columns
        return cls(
            blocks=blocks,
            sizes=sizes,
            phases=phases,
            layers=layers,
            owners={int(block): owner for block, owner in head["owners"]},
            layer_of={int(block): layer for block, layer in head["layer_of"]},
            work={(phase, layer): Work(**w) for phase, layer, w in head["work"]},
            trainable=head["trainable"],
        )

    def total_work(self) -> Work:
        """Return the work of one step."""
        return sum(self.work.values(), Work())
