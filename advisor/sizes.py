"""The memory of one configuration at many micro-batches and sequence lengths, from few traces.

Every size in a trace is a sum of a few monomials of micro-batch and sequence length
(`probes/interpolate.py`), as long as the step does the same things. Where a trace made to check
says that it does not, the sizes are parted, and what is left over is traced one by one.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lora_advisor.advisor.traces import REGULAR_TOKENS, TraceStore
from lora_advisor.models.traced import TracedMemory
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.interpolate import BASES, Family, Size, samples
from lora_advisor.probes.kernel_costs import PACKED_ROWS

if TYPE_CHECKING:
    from lora_advisor.probes.events import Trace

#: Two sizes of one block that are this close are one: CUDA rounds to 512 bytes.
_ROUNDING = 1024
#: Sizes that are worth a family of traces, and replays that are worth a second process.
_FEW, _MANY = 6, 100

Answers = dict[Size, TracedMemory]


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
    _known: Answers = field(default_factory=dict)

    def memory(self, sizes: Iterable[Size]) -> Answers:
        """Return what the traces of these sizes come to."""
        sizes = list(dict.fromkeys(sizes))
        new = [size for size in sizes if size not in self._known]
        executor = _executor() if len(new) >= _MANY else None
        waiting: list[Future[Answers]] = []
        for part in self._parts(new):
            # Other processes replay one part while the next is traced here.
            self._fill(part, executor, waiting)
        for future in waiting:
            self._known.update(future.result())
        return {size: self._known[size] for size in sizes}

    def _parts(self, sizes: Sequence[Size]) -> list[list[Size]]:
        """Part sizes where a step is known to change, the largest part first.

        bitsandbytes changes kernels with the tokens, TRL's loss stops growing its tile, and layers
        with a sliding window need a mask from its length on.
        """
        bounds = [0.0, math.inf]
        if self.config.method == "qlora":
            bounds.insert(1, PACKED_ROWS)
        if self.config.trainer == "trl":
            bounds.insert(-1, REGULAR_TOKENS)
        window = self.store.architecture.hf_config.get("sliding_window") or math.inf
        each = self.config.sequences // self.config.micro_batch
        parts = [
            [s for s in sizes if low < each * s[0] * s[1] <= high and (s[1] < window) == below]
            for low, high in itertools.pairwise(bounds)
            for below in (True, False)
        ]
        return sorted((part for part in parts if part), key=len, reverse=True)

    def _fill(
        self, sizes: Sequence[Size], executor: Executor | None, waiting: list[Future[Answers]]
    ) -> None:
        if len(sizes) <= _FEW:
            for size, trace in self.store.sampled(self.config, sizes).items():
                self._known[size] = _memory(trace, self.config, self.cap_bytes)
            return
        family = self._family(sizes)
        if family is None:
            for part in _halves(sizes):
                self._fill(part, executor, waiting)
        elif executor is None:
            self._known.update(_replay_all(family, sizes, self.config, self.cap_bytes))
        else:
            workers = os.cpu_count() or 1
            waiting += [
                executor.submit(
                    _replay_all, family, sizes[start::workers], self.config, self.cap_bytes
                )
                for start in range(workers)
            ]

    def _family(self, sizes: Sequence[Size]) -> Family | None:
        """Return traces from which all sizes follow; None where the step does different things."""
        telling = samples(sizes, BASES[-1])
        for count in BASES:
            chosen = samples(sizes, count)
            # A size that other monomials would show at, were they there; else any other.
            check = next(size for size in [*telling, *reversed(sizes)] if size not in chosen)
            made = self.store.sampled(self.config, [*chosen, check])
            own = made.pop(check)
            family = Family(made)
            if not family.alike(own):
                return None
            if family.agrees(check, own, within=_ROUNDING):
                return family if all(map(family.determines, sizes)) else None
        return None


def _halves(sizes: Sequence[Size]) -> list[list[Size]]:
    """Part sizes of which not all follow from the same traces.

    A batch of one has slices that are contiguous, so it comes apart first; then kernels change with
    the number of tokens.
    """
    single = [size for size in sizes if size[0] == 1]
    if single and len(single) < len(sizes):
        return [single, [size for size in sizes if size[0] > 1]]
    ordered = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    middle = len(ordered) // 2
    return [ordered[:middle], ordered[middle:]]


def _executor() -> Executor | None:
    if (os.cpu_count() or 1) < 2:
        return None
    from joblib.externals.loky import get_reusable_executor

    executor: Executor = get_reusable_executor(max_workers=os.cpu_count())
    return executor


def _replay_all(
    family: Family, sizes: Sequence[Size], config: RunConfig, cap_bytes: int
) -> Answers:
    answers = {}
    for size in sizes:
        trace = family.at(size)
        assert trace is not None  # the family was checked
        answers[size] = _memory(trace, config, cap_bytes)
    return answers


def _memory(trace: Trace, config: RunConfig, cap_bytes: int) -> TracedMemory:
    from lora_advisor.models.replayed import brief_memory

    expandable = config.allocator == "expandable_segments"
    return brief_memory(trace, expandable=expandable, cap_bytes=cap_bytes)
