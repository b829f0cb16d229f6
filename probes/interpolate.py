"""Traces of other sizes from traces that were made: exact where a step does the same things.

Every size in a trace is a product of dimensions: of the micro-batch B, the sequence length S, and
figures of the model. So it is a sum of the monomials 1, S, B, BS and, where attention keeps its
scores or a mask, S^2 and BS^2 (section 3 of docs/architecture.md). As many traces as monomials give
the coefficients; where the step does other things at another size, the events differ in kind and
there is no answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_advisor.probes.events import Trace, Work

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Micro-batch and sequence length.
Size = tuple[int, int]

_MONOMIALS: tuple[Callable[[int, int], int], ...] = (
    lambda b, s: 1,
    lambda b, s: b * s,
    lambda b, s: s,
    lambda b, s: b,
    lambda b, s: b * s * s,
    lambda b, s: s * s,
)
#: Numbers of monomials: of a step whose attention keeps neither scores nor a mask, and of any.
BASES = (4, len(_MONOMIALS))


class Family:
    """Traces of one configuration at several sizes, and what follows for others."""

    def __init__(self, traces: Mapping[Size, Trace]) -> None:
        """Take the traces; there must be at least one."""
        self.sizes = tuple(traces)
        self._traces = [_in_order(trace) for trace in traces.values()]

    def alike(self, *more: Trace) -> bool:
        """Whether these steps, and those of `more` traces, do the same things in the same order."""
        first, *others = self._traces
        return all(_same_kind(first, other) for other in [*others, *map(_in_order, more)])

    def at(self, size: Size) -> Trace | None:
        """Return the trace of another size; None where these do not determine it."""
        shares = self._shares(size)
        if shares is None or not self.alike() or not _holds(self._traces, shares):
            return None
        return _mixed(self._traces, shares)

    def determines(self, size: Size) -> bool:
        """Whether there is a trace of another size."""
        shares = self._shares(size)
        return shares is not None and _holds(self._traces, shares)

    def agrees(self, size: Size, made: Trace, *, within: int) -> bool:
        """Whether what follows for a size is what its trace holds, to `within` bytes a block."""
        import numpy

        own, following = _in_order(made), self.at(size)
        return (
            following is not None
            and _same_kind(following, own)
            and int(numpy.abs(following.sizes - own.sizes).max()) <= within
        )

    def _shares(self, size: Size) -> NDArray[Any] | None:
        """Return how much of each trace there is in that of `size`."""
        import numpy

        rows = monomials([*self.sizes, size], len(self.sizes))
        known, wanted = rows[:-1], rows[-1]
        shares: NDArray[Any] = numpy.linalg.lstsq(known.T, wanted)[0]
        # Sizes on a line determine only sizes on that line.
        return shares if numpy.allclose(known.T @ shares, wanted, rtol=0, atol=1e-9) else None


def monomials(sizes: Sequence[Size], count: int) -> NDArray[Any]:
    """Return the first `count` monomials of each size, a row a size, each scaled to at most 1."""
    import numpy

    table = numpy.array([[float(m(*size)) for m in _MONOMIALS[:count]] for size in sizes])
    scaled: NDArray[Any] = table / numpy.abs(table).max(axis=0)
    return scaled


def samples(sizes: Sequence[Size], count: int) -> list[Size]:
    """Return those sizes whose traces determine the others best, at most `count`.

    They are the pivots of a QR decomposition: each the one least determined by those before it.
    """
    import numpy
    from scipy.linalg import qr

    table = monomials(sizes, count)
    triangle, pivots = qr(table.T, mode="r", pivoting=True)
    weight = numpy.abs(numpy.diag(triangle))
    rank = int((weight > 1e-9 * weight[0]).sum())
    return [sizes[index] for index in pivots[:rank]]


def between(low: Trace, high: Trace, *, share: float) -> Trace | None:
    """Return the trace of a micro-batch between or beyond two others of one configuration.

    Args:
        low: Trace of the smaller micro-batch.
        high: Trace of the larger one.
        share: Position of the wanted micro-batch; 0 at `low`, 1 at `high`.
    """
    traces = [_in_order(low), _in_order(high)]
    shares = [1 - share, share]
    if not _same_kind(*traces) or not _holds(traces, shares):
        return None
    return _mixed(traces, shares)


def _same_kind(a: Trace, b: Trace) -> bool:
    import numpy

    return len(a.blocks) == len(b.blocks) and all(
        numpy.array_equal(x, y)
        for x, y in (
            (a.blocks, b.blocks),
            (a.phases, b.phases),
            (a.layers, b.layers),
            (a.sizes > 0, b.sizes > 0),
        )
    )


def _holds(traces: Sequence[Trace], shares: Sequence[float] | NDArray[Any]) -> bool:
    """Whether every block of a mixture is larger than nothing.

    One that would not be is there at some sizes only, or is what is left over by full tiles.
    """
    import numpy

    sizes = numpy.rint(sum(t.sizes * share for t, share in zip(traces, shares, strict=True)))
    return numpy.array_equal(numpy.sign(sizes), numpy.sign(traces[0].sizes))


def _mixed(traces: Sequence[Trace], shares: Sequence[float] | NDArray[Any]) -> Trace:
    import numpy

    sizes = numpy.rint(sum(t.sizes * share for t, share in zip(traces, shares, strict=True)))
    first = traces[0]
    work: dict[tuple[str, int], Work] = {}
    for trace, share in zip(traces, shares, strict=True):
        for place, amount in trace.work.items():
            work[place] = work.get(place, Work()) + amount.times(float(share))
    return Trace(
        blocks=first.blocks,
        sizes=sizes.astype(numpy.int64),
        phases=first.phases,
        layers=first.layers,
        owners=first.owners,
        layer_of=first.layer_of,
        work=work,
        trainable=first.trainable,
        layer_trainable=first.layer_trainable,
        layer_loaded=first.layer_loaded,
    )


def _in_order(trace: Trace) -> Trace:
    """Return the trace with each run of releases in the order of their blocks.

    What is released together (autocast's casts of the weights, at the end of a pass) is released
    in an order that follows addresses and differs between two runs of one program.
    """
    import dataclasses

    import numpy

    released = trace.sizes < 0
    run = numpy.cumsum(~released)
    order = numpy.lexsort((numpy.where(released, trace.blocks, 0), released, run))
    return dataclasses.replace(
        trace,
        blocks=trace.blocks[order],
        sizes=trace.sizes[order],
        phases=trace.phases[order],
        layers=trace.layers[order],
    )
