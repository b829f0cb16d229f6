"""The memory of one configuration at many micro-batches and sequence lengths, from few traces.

Every size in a trace is a sum of a few monomials of micro-batch and sequence length
(`probes/interpolate.py`), as long as the step does the same things. Where it does not, the sizes
are parted: at the tile of TRL's loss, and wherever a trace that was made to check disagrees. What is
left over is traced one by one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lora_advisor.advisor.traces import REGULAR_TOKENS, TraceStore
from lora_advisor.models.traced import TracedMemory
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.interpolate import LINEAR, MONOMIALS, Family, Size

#: Two sizes of one block that are this close are one: CUDA rounds to 512 bytes.
_ROUNDING = 1024
#: Replays that are worth a second process.
_MANY = 16


@dataclass
class SizeMap:
    """Memory by size, filled as it is asked for.

    Attributes:
        store: Traces.
        config: What all sizes share.
        cap_bytes: What the allocator may take.
    """

    store: TraceStore
    config: RunConfig
    cap_bytes: int
    _known: dict[Size, TracedMemory] = field(default_factory=dict)
    _families: list[tuple[frozenset[Size], Family]] = field(default_factory=list)

    def memory(self, sizes: Iterable[Size]) -> dict[Size, TracedMemory]:
        """Return what the traces of these sizes come to."""
        sizes = list(dict.fromkeys(sizes))
        new = [size for size in sizes if size not in self._known]
        for part in _parts(new):
            self._fill(part)
        return {size: self._known[size] for size in sizes}

    def _fill(self, sizes: Sequence[Size]) -> None:
        family = self._family(sizes)
        if family is not None:
            self._known.update(self._replayed(family, sizes))
            return
        if len(sizes) > 2 * len(MONOMIALS):
            lengths = sorted({length for _, length in sizes})
            middle = lengths[len(lengths) // 2]
            halves = [[s for s in sizes if s[1] < middle], [s for s in sizes if s[1] >= middle]]
            if all(halves):
                for half in halves:
                    self._fill(half)
                return
        for size, trace in self.store.sampled(self.config, sizes).items():
            self._known[size] = _memory(trace, self.config, self.cap_bytes)

    def _family(self, sizes: Sequence[Size]) -> Family | None:
        """Return traces from which all sizes follow; None where that is not so, or not worth it."""
        if len(sizes) <= len(MONOMIALS):
            return None
        corners = _spread(sizes)
        made = self.store.sampled(self.config, corners[: LINEAR + 1])
        for count in (LINEAR, len(MONOMIALS)):
            if len(corners) <= count:
                return None
            made.update(self.store.sampled(self.config, corners[len(made) : count + 1]))
            check = corners[count]
            family = Family({size: made[size] for size in corners[:count]})
            if not family.alike():
                return None
            if family.agrees(check, made[check], within=_ROUNDING):
                return family
        return None

    def _replayed(self, family: Family, sizes: Sequence[Size]) -> dict[Size, TracedMemory]:
        workers = min(os.cpu_count() or 1, len(sizes) // _MANY)
        if workers < 2:
            return _replay_all(family, sizes, self.config, self.cap_bytes)
        from joblib import Parallel, delayed

        shares = [sizes[start::workers] for start in range(workers)]
        made = Parallel(n_jobs=workers)(
            delayed(_replay_all)(family, share, self.config, self.cap_bytes) for share in shares
        )
        return {size: memory for part in made for size, memory in part.items()}


def _replay_all(
    family: Family, sizes: Sequence[Size], config: RunConfig, cap_bytes: int
) -> dict[Size, TracedMemory]:
    answers = {}
    for size in sizes:
        trace = family.at(size)
        assert trace is not None  # the family was checked
        answers[size] = _memory(trace, config, cap_bytes)
    return answers


def _memory(trace: object, config: RunConfig, cap_bytes: int) -> TracedMemory:
    from lora_advisor.models.replayed import traced_memory

    expandable = config.allocator == "expandable_segments"
    return traced_memory(trace, expandable=expandable, cap_bytes=cap_bytes)  # type: ignore[arg-type]


def _parts(sizes: Sequence[Size]) -> list[list[Size]]:
    """Part sizes at the tile of TRL's loss, below which it grows with the tokens."""
    below = [size for size in sizes if size[0] * size[1] <= REGULAR_TOKENS]
    above = [size for size in sizes if size[0] * size[1] > REGULAR_TOKENS]
    return [part for part in (below, above) if part]


def _spread(sizes: Sequence[Size]) -> list[Size]:
    """Return sizes far apart, enough for the coefficients and for a check, the corners first."""
    batches = [batch for batch, _ in sizes]
    lengths = [length for _, length in sizes]
    corners = [
        min(sizes, key=lambda s: (s[0], s[1])),
        max(sizes, key=lambda s: (s[0], -s[1])),
        max(sizes, key=lambda s: (s[1], -s[0])),
        max(sizes, key=lambda s: (s[0] * s[1], s[0])),
    ]
    chosen = list(dict.fromkeys(corners))
    scale = (max(batches) - min(batches) or 1, max(lengths) - min(lengths) or 1)

    def distance(a: Size, b: Size) -> float:
        return abs(a[0] - b[0]) / scale[0] + abs(a[1] - b[1]) / scale[1]

    while len(chosen) < min(len(sizes), len(MONOMIALS) + 1):
        chosen.append(max(sizes, key=lambda s: min(distance(s, c) for c in chosen)))
    return chosen
