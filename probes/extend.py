"""Extend the trace of a few decoder layers to all of them, event by event.

Decoder layers repeat: what an inner layer allocates in its forward and backward pass, every other
inner layer allocates too, in the same order. So the trace of a few layers, with one inner layer (or
one period of them) repeated, is the trace of the whole model; a test compares the two. Where the
inner layers turn out not to repeat, the caller traces all of them.
"""

from __future__ import annotations

import gc
import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lora_advisor.probes.architectures import Architecture, build_hf_config
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.events import Event, Trace, Work
from lora_advisor.probes.trace import trace_step

#: Groups of layers traced: the one repeated, one neighbour on each side to check that it repeats
#: and to read off what passes between layers, and the first and the last, which are special.
_GROUPS = 5
#: Layers that repeat may seem not to, most likely where Python's collector releases something among
#: them; that is rare, so that a second time they do.
_TRIES = 2
#: The first block of a trace, reserved for all weights before the first is loaded.
_RESERVED = 1


def trace_all_layers(
    config: RunConfig, architecture: Architecture, *, capability: str | None = None
) -> Trace:
    """Return the trace of the whole model, from few layers where they repeat.

    Args:
        config: What to trace.
        architecture: The model's figures.
        capability: Compute capability of the card; None for a current one.
    """
    total = architecture.num_layers
    if total is not None:
        period = _period(config, architecture)
        few = _GROUPS * period + total % period
        if few + period <= total:
            for _ in range(_TRIES):
                gc.collect()
                trace = trace_step(config, architecture, layers=few, capability=capability)
                extended = _extend(trace, period=period, copies=(total - few) // period)
                if extended is not None:
                    return extended
    return trace_step(config, architecture, capability=capability)


def _period(config: RunConfig, architecture: Architecture) -> int:
    """After how many layers the pattern of attention and checkpointing repeats."""
    every = config.checkpoint_every or 1
    kinds = getattr(build_hf_config(architecture).get_text_config(), "layer_types", None) or [""]
    pattern = next(
        p
        for p in range(1, len(kinds) + 1)
        if all(a == b for a, b in zip(kinds, kinds[p:], strict=False))
    )
    return math.lcm(every, pattern)


@dataclass
class _Runs:
    """The events cut into runs: the passage through one group of layers, or what lies between."""

    keys: list[tuple[int, str, int]] = field(default_factory=list)
    events: dict[tuple[int, str, int], list[Event]] = field(default_factory=dict)
    born: dict[int, tuple[tuple[int, str, int], int]] = field(default_factory=dict)


def _cut(trace: Trace, period: int) -> _Runs:
    """Cut the events into runs; a run's key is (occurrence, phase, group)."""
    runs = _Runs()
    seen: dict[tuple[str, int], int] = defaultdict(int)
    allocations: dict[tuple[int, str, int], int] = defaultdict(int)
    last: tuple[str, int] | None = None
    for event in trace.events:
        place = (event.phase, event.layer // period if event.layer >= 0 else -1)
        if place != last:
            seen[place] += 1
            last = place
            runs.keys.append((seen[place], *place))
            runs.events[runs.keys[-1]] = []
        key = runs.keys[-1]
        runs.events[key].append(event)
        if event.size > 0:
            runs.born[event.block] = (key, allocations[key])
            allocations[key] += 1
    return runs


def _extend(trace: Trace, *, period: int, copies: int) -> Trace | None:
    """Return the trace with the middle group repeated `copies` times more; None if it cannot be."""
    runs = _cut(trace, period)
    middle = _GROUPS // 2
    if not _repeats(runs, middle):
        return None
    return _Copier(trace, runs, period=period, middle=middle, copies=copies).run()


def _repeats(runs: _Runs, middle: int) -> bool:
    """Whether the middle group and its neighbours allocate and release the same."""

    def shape(group: int) -> list[list[int]]:
        return [[e.size for e in runs.events[key]] for key in runs.keys if key[2] == group]

    return shape(middle - 1) == shape(middle) == shape(middle + 1)


class _Copier:
    """Writes the longer list of events.

    Group g of the long model stands for group `template(g)` of the short one. A block of the long
    model is the pair (block of the short model's template, g).
    """

    def __init__(self, trace: Trace, runs: _Runs, *, period: int, middle: int, copies: int) -> None:
        self.trace, self.runs, self.period = trace, runs, period
        self.middle, self.copies = middle, copies
        self.numbers: dict[tuple[int, int], int] = {}
        self.events: list[Event] = []
        self.owners: dict[int, str] = {}
        self.layer_of: dict[int, int] = {}
        self.nth = {place: block for block, place in runs.born.items()}
        self.home = self.homes()
        inner = trace.layer_loaded[middle * period : (middle + 1) * period]
        self.reserved_more = copies * sum(inner)

    def template(self, group: int) -> int:
        if group <= self.middle:
            return group
        return max(self.middle, group - self.copies)

    def groups_of(self, template: int) -> list[int]:
        if template < self.middle:
            return [template]
        if template == self.middle:
            return list(range(self.middle, self.middle + self.copies + 1))
        return [template + self.copies]

    def number(self, block: int, group: int) -> int:
        return self.numbers.setdefault((block, group), len(self.numbers) + 1)

    def run(self) -> Trace | None:
        for key in self.runs.keys:
            _, phase, group = key
            if group == self.middle and phase == "backward":
                # Copies come later in the model, so their backward pass comes first.
                for long in reversed(self.groups_of(group)):
                    self.write(key, long)
            elif group >= 0:
                for long in self.groups_of(group):
                    self.write(key, long)
            else:
                self.write_between(key)
        return Trace.of(
            self.events,
            owners=self.owners,
            layer_of=self.layer_of,
            work=self.work(),
            trainable=self.trainable(),
        )

    def trainable(self) -> int:
        first = self.middle * self.period
        inner = self.trace.layer_trainable[first : first + self.period]
        return self.trace.trainable + self.copies * sum(inner)

    def write(self, key: tuple[int, str, int], group: int) -> None:
        """Write one passage through a group."""
        for event in self.runs.events[key]:
            if event.size > 0:
                self.emit(event, event.block, group)
                continue
            born, index = self.runs.born[event.block]
            if born[2] < 0:
                self.emit(event, event.block, group)
                continue
            if (born[2] - self.middle) * (key[2] - self.middle) < 0:
                # From one end of the model to the other: a gradient that all layers add to.
                self.emit(event, event.block, self.groups_of(born[2])[0])
                continue
            source = group + born[2] - key[2]  # the same distance between groups as in the template
            twin = self.nth.get(((born[0], born[1], self.template(source)), index))
            self.emit(event, event.block if twin is None else twin, source)

    def write_between(self, key: tuple[int, str, int]) -> None:
        """Write what happens outside the layers, for every copy of what belongs to one.

        What belongs to one layer and follows one another (its weights, when they are loaded) is
        written layer by layer, as the long model does it.
        """
        for group, events in itertools.groupby(
            self.runs.events[key], lambda event: self.home.get(event.block, -1)
        ):
            together = list(events)
            for long in [-1] if group < 0 else self.groups_of(group):
                for event in together:
                    self.emit(event, event.block, long)

    def homes(self) -> dict[int, int]:
        """Return the group of each block that belongs to one.

        It is the group whose pass allocates it, whose parameter or state it is, or, for what is
        allocated before and goes within a pass (a bias that is cast when first used), the group
        whose pass releases it.
        """
        home = {block: layer // self.period for block, layer in self.trace.layer_of.items()}
        for block, ((_, _, group), _) in self.runs.born.items():
            if group >= 0:
                home[block] = group
        for key in self.runs.keys:
            for event in self.runs.events[key] if key[2] >= 0 else ():
                if event.size < 0:
                    home.setdefault(event.block, key[2])
            if key[1] == "load":
                self.settle_loading(self.runs.events[key], home)
        return home

    def settle_loading(self, events: Sequence[Event], home: dict[int, int]) -> None:
        """Give what is made and gone while a layer's weight is made to that layer."""
        homeless: set[int] = set()
        dead = {event.block for event in events if event.size < 0}
        for event in events:
            if event.size < 0:
                homeless.discard(event.block)
            elif event.block in home:
                home.update(dict.fromkeys(homeless, home[event.block]))
                homeless.clear()
            elif event.block in dead:
                homeless.add(event.block)

    def emit(self, event: Event, block: int, group: int) -> None:
        number = self.number(block, group) if event.size else 0
        size = event.size
        if block == _RESERVED:
            size += self.reserved_more if size > 0 else -self.reserved_more
        self.events.append(Event(number, size, event.phase, event.layer))
        if block in self.trace.owners and event.size > 0:
            self.owners[number] = self.trace.owners[block]
            if group >= 0:
                self.layer_of[number] = group

    def work(self) -> Mapping[tuple[str, int], Work]:
        """Return the work with the middle group's counted once more for each copy.

        That of the optimizer, which runs outside the layers, goes with the parameters it trains.
        """
        inner = range(self.middle * self.period, (self.middle + 1) * self.period)
        work = dict(self.trace.work)
        for (phase, layer), amount in self.trace.work.items():
            if layer in inner:
                work[phase, layer] = amount.times(1 + self.copies)
            elif phase == "optimizer":
                work[phase, layer] = amount.times(self.trainable() / self.trace.trainable)
        return work
