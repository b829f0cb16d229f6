"""What a search has seen: which sizes that settles, and which is to be asked for next."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from lora_advisor.advisor.traces import REGULAR_TOKENS
from lora_advisor.models.allocator import MIB
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.plan import Candidate

#: What is plain: taken where another is no faster.
PLAIN = {
    "optimizer": "adamw_torch_fused",
    "kernels": "none",
    "compile": "off",
    "embedding": "device",
}
#: What a run holds whatever its size; all else at its peak grows with the size.
_WHATEVER_SIZE = ("weights", "adapter", "optimizer")
#: By which factor a size may need less than a line through others says, or another allocator less
#: than this one: buffers of kernels for few tokens, gradients that accumulate, segments cut up.
_OFF_THE_LINE = 1.05
#: How coarse a single figure is: the allocator takes segments of 20 MiB, and the smallest cap is
#: looked for in steps of 16 MiB (`models.replayed`).
_GRAIN = 40 * MIB
#: What may be said to fit needs this much less than the cap (`models.memory`).
_ROOM = 1.03


@dataclass
class Seen:
    """Candidates so far, and which sizes of an otherwise equal configuration they settle.

    What is smaller than one that fits is not better; what is larger than one that does not fit does
    not fit either, nor does what is smaller and would still be far beyond the cap. The size is the
    micro-batch, or the sequence length where that is sought; configurations that differ in nothing
    else are an arm.
    """

    size: str
    cap_bytes: int
    candidates: dict[RunConfig, Candidate] = field(default_factory=dict)
    fits: dict[RunConfig, int] = field(default_factory=dict)
    fails: dict[RunConfig, int] = field(default_factory=dict)
    _sizes: dict[RunConfig, dict[int, Candidate]] = field(default_factory=dict, repr=False)
    _kin: dict[RunConfig, list[Candidate]] = field(default_factory=dict, repr=False)

    def add(self, candidate: Candidate) -> None:
        """Take a candidate up."""
        config, verdict = candidate.config, candidate.prediction.verdict
        self.candidates[config] = candidate
        self._kin.setdefault(_family(config), []).append(candidate)
        arm, size = self._arm(config), getattr(config, self.size)
        self._sizes.setdefault(_any_allocator(arm), {}).setdefault(size, candidate)
        if verdict == "fits":
            self.fits[arm] = max(size, self.fits.get(arm, 0))
        elif verdict == "does not fit":
            self.fails[arm] = min(size, self.fails.get(arm, size))

    def settles(self, config: RunConfig) -> bool:
        """Whether a configuration need not be asked for."""
        arm, size = self._arm(config), getattr(config, self.size)
        fails = self.fails.get(arm)
        if size < self.fits.get(arm, 0) or (fails is not None and size > fails):
            return True
        least = None if config in self.candidates else self.least_bytes(config)
        return least is not None and least > self.cap_bytes

    def least_bytes(self, config: RunConfig, without: Collection[str] = ()) -> float | None:
        """Return what a size needs at least, by what is known of others.

        At each instant a step holds what stays and what is linear in the rows of a micro-batch (in
        a sequence's length: at most quadratic). The peak over instants is convex: a smaller size
        needs at least its share of what a larger one holds beyond what stays, a larger one at
        least what the line through two smaller ones says, once a step does the same things.

        Args:
            config: The configuration.
            without: Components to leave out.

        Returns:
            Bytes; None where too little is known.
        """
        known, size = self._known(config), int(getattr(config, self.size))
        larger = min((other for other in known if other >= size), default=None)
        if larger is None:
            regular = [n for n in sorted(known) if known[n].config.tokens >= REGULAR_TOKENS]
            if len(regular) < 2:
                return None
            low, high = regular[-2:]
            less, more = (_needed(known[other], without) for other in (low, high))
            times = (size - high) / (high - low)
            line = more + (more - less) * times
            return line / _OFF_THE_LINE - _GRAIN * (1 + times)
        stays, needed = _stays(known[larger], without), _needed(known[larger], without)
        share = size / larger if self.size == "micro_batch" else (size / larger) ** 2
        least = stays + (needed - stays) * share
        same = larger == size and known[larger].config.allocator == config.allocator
        return least if same else least / _OFF_THE_LINE - _GRAIN

    def next_of(self, arm: Sequence[RunConfig]) -> RunConfig | None:
        """Return which size of an arm is to be asked for next; None where all are settled.

        That is the largest that should fit, then its neighbours; the middle one where nothing is
        known yet.

        Args:
            arm: Its sizes, ascending.
        """
        if not self._known(arm[0]):
            return arm[len(arm) // 2]
        unsettled = [c for c in arm if c not in self.candidates and not self.settles(c)]
        room = self.room(arm[0])
        should_fit = [c for c in unsettled if getattr(c, self.size) <= room]
        return should_fit[-1] if should_fit else next(iter(unsettled), None)

    def room(self, config: RunConfig) -> float:
        """Return the size that should just fit: on a line through what is known around the cap."""
        if not self._known(config):
            return math.inf
        known = self._known(config)
        first = known[min(known)]
        points = [(0, _stays(first)), *((size, _held(known[size])) for size in sorted(known))]
        beyond = (at for at, (_, held) in enumerate(points) if held > self.cap_bytes)
        at = max(1, next(beyond, len(points) - 1))
        (low, less), (high, more) = points[at - 1], points[at]
        slope = (more - less) / (high - low)
        return low + (self.cap_bytes - less) / slope if slope > 0 else math.inf

    def has_better(self, config: RunConfig) -> bool:
        """Whether one that fits only recomputes less or has the plain optimizer.

        By a card's figures it is faster; where speeds are measured they may say otherwise.
        """
        plain = PLAIN["optimizer"]
        return any(
            candidate.config != config
            and candidate.config.optimizer in (plain, config.optimizer)
            and _recomputed(candidate.config) <= _recomputed(config)
            and candidate.prediction.verdict == "fits"
            for candidate in self._kin.get(_family(config), ())
        )

    def speed_at_most(self, config: RunConfig) -> float | None:
        """Return a bound of a configuration's speed from those that recompute less and more.

        A step's time is linear in how many layers are recomputed, and by a card's figures tokens/s
        do not fall with the micro-batch. So it is what the same lie at in between, of the same
        micro-batch or the next larger one of which both are known; None where there is none.
        """
        batch = config.micro_batch * config.accumulation
        for size in range(config.micro_batch, batch + 1):
            if batch % size == 0:
                same = config.replace(micro_batch=size, accumulation=batch // size)
                speed = self._speed_between(same)
                if speed is not None:
                    return speed
        return None

    def _speed_between(self, config: RunConfig) -> float | None:
        share = _recomputed(config)
        times = {
            _recomputed(candidate.config): 1 / candidate.tokens_per_s
            for candidate in self._kin.get(_family(config), ())
            if candidate.config.optimizer == config.optimizer and candidate.tokens_per_s
        }
        less = max((other for other in times if other <= share), default=None)
        more = min((other for other in times if other >= share), default=None)
        if less is None or more is None:
            return None
        part = 0.0 if more == less else (share - less) / (more - less)
        return 1 / (times[less] * (1 - part) + times[more] * part)

    def that(self, *verdicts: str) -> list[Candidate]:
        """Return the candidates of these verdicts."""
        return [c for c in self.candidates.values() if c.prediction.verdict in verdicts]

    def _known(self, config: RunConfig) -> dict[int, Candidate]:
        return self._sizes.get(_any_allocator(self._arm(config)), {})

    def _arm(self, config: RunConfig) -> RunConfig:
        if self.size == "seq_len":
            return config.replace(seq_len=2)
        return config.replace(micro_batch=1, accumulation=1)


def _family(config: RunConfig) -> RunConfig:
    """Return what stands for all that differ in nothing but checkpointing and optimizer."""
    return config.replace(optimizer=PLAIN["optimizer"], checkpointing="off")


def _recomputed(config: RunConfig) -> float:
    """Return the share of layers that a step recomputes."""
    return 0.0 if config.checkpoint_every is None else 1 / config.checkpoint_every


def _any_allocator(arm: RunConfig) -> RunConfig:
    """Return what stands for all that differ in the allocator's setting: the same tensors live."""
    return arm.replace(allocator="default")


def _stays(candidate: Candidate, without: Collection[str] = ()) -> int:
    """Return the bytes that a run holds whatever its size."""
    components = candidate.prediction.memory.components
    return sum(components.get(name, 0) for name in _WHATEVER_SIZE if name not in without)


def _needed(candidate: Candidate, without: Collection[str] = ()) -> int:
    """Return the smallest cap a run survives, less some components."""
    memory = candidate.prediction.memory
    return memory.needed_bytes - sum(memory.components.get(name, 0) for name in without)


def _held(candidate: Candidate) -> float:
    """Return what the cap must be for a run to be said to fit, about."""
    memory = candidate.prediction.memory
    return max(memory.needed_bytes * _ROOM, memory.reserved_bytes)
