"""The largest sizes that fit, from few traces: where the border lies is computed, then traced.

From two traces of sizes on a line follow those of the others (`probes/interpolate.py`), and from
them where the border should lie. There the step is traced itself, and so on, until the computed
border is one that was traced. So the last size that fits is answered as `fit` would for it alone,
whatever the step does elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lora_advisor.advisor.predictor import Predictor
from lora_advisor.advisor.trace_cache import key_of
from lora_advisor.advisor.traces import resized
from lora_advisor.probes.architectures import Architecture
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.interpolate import Family, Size
from lora_advisor.probes.machine import detect_stack

#: Sequence lengths looked at are its multiples.
SEQ_STEP = 64
#: Up to these, where the model's figures name no longest sequence.
MOST_TOKENS, MOST_SEQUENCES = 131_072, 512
#: Raised when the search gives other answers, so that kept ones are not found.
_VERSION = 1
#: Parts of the peak that do not grow with the size.
_CONSTANT = ("weights", "adapter", "gradients", "optimizer", "workspace")
#: Guesses from a single trace, before the border is looked for by halves.
_GUESSES = 4


@dataclass(frozen=True, kw_only=True)
class Largest:
    """The largest sizes that fit for certain.

    Attributes:
        seq_len: Longest sequence at the asked micro-batch; None where none fits.
        micro_batch: Largest micro-batch at the asked sequence length; None where none fits.
        seq_len_searched_to: Longest sequence looked at: where it fits, longer ones may.
        micro_batch_searched_to: Largest micro-batch looked at.
    """

    seq_len: int | None
    micro_batch: int | None
    seq_len_searched_to: int
    micro_batch_searched_to: int


def longest_sequence(architecture: Architecture) -> int | None:
    """Return the longest sequence a model is made for; None where its figures do not say."""
    figures: Any = architecture.hf_config
    for part in (figures, figures.get("text_config") or {}):
        for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
            if isinstance(part.get(name), int) and part[name] > 1:
                return int(part[name])
    return None


def largest(config: RunConfig, predictor: Predictor) -> Largest:
    """Return the largest sizes that fit; kept on disk where no probe has taught the predictor."""
    store, memory = predictor.store, predictor.memory
    marker = {
        "largest": _VERSION,
        "limit_bytes": predictor.limit_bytes,
        "context": dataclasses.asdict(memory.context),
    }
    key = key_of(
        detect_stack(),
        store.capability,
        store.architecture.fingerprint,
        {**config.to_json(), **marker},
    )
    kept = None if memory.probes else store.cache.get(key)
    if kept is not None:
        return Largest(**kept)
    most = min(longest_sequence(store.architecture) or MOST_TOKENS, MOST_TOKENS)
    lengths = sorted({*range(SEQ_STEP, most + 1, SEQ_STEP), config.seq_len})
    batches = sorted({*range(1, MOST_SEQUENCES + 1), config.micro_batch})
    found = Largest(
        seq_len=_last_that_fits(
            predictor, config, [(config.micro_batch, length) for length in lengths], axis=1
        ),
        micro_batch=_last_that_fits(
            predictor, config, [(batch, config.seq_len) for batch in batches], axis=0
        ),
        seq_len_searched_to=lengths[-1],
        micro_batch_searched_to=batches[-1],
    )
    if not memory.probes:
        store.cache.put(key, dataclasses.asdict(found))
    return found


def _last_that_fits(
    predictor: Predictor, config: RunConfig, line: Sequence[Size], *, axis: int
) -> int | None:
    start = line.index((config.micro_batch, config.seq_len))
    border = _Border(predictor, config, line)
    index = border.find(start)
    return None if index is None else line[index][axis]


@dataclass
class _Border:
    """The last size on a line that fits, narrowed down trace by trace.

    Attributes:
        low: Last place that is known to fit; -1 while none is.
        high: First place that is known not to; behind the line while none is.
        traced: Places that were traced, in this order.
    """

    predictor: Predictor
    config: RunConfig
    line: Sequence[Size]
    low: int = -1
    high: int = 0
    traced: list[int] = field(default_factory=list)

    def find(self, start: int) -> int | None:
        """Return the place of the last size that fits; None if none does.

        Args:
            start: Place of a size that was traced already.
        """
        self.high = len(self.line)
        self._trace(start)
        while self.high - self.low > 1:
            place = self._computed()
            if place is None:
                place = self._guessed()
            elif place == self.low and place in self.traced:
                break
            self._trace(min(max(place, self.low + 1), self.high - 1))
        return self.low if self.low >= 0 else None

    def _sized(self, place: int) -> RunConfig:
        return resized(self.config, self.line[place])

    def _trace(self, place: int) -> None:
        fits = self.predictor.predict(self._sized(place)).verdict == "fits"
        self.low, self.high = (place, self.high) if fits else (self.low, place)
        self.traced.append(place)

    def _computed(self) -> int | None:
        """Return where the border lies by the traces of the two places nearest to the last one."""
        near = sorted(self.traced, key=lambda place: abs(place - self.traced[-1]))[:2]
        if len(near) < 2:
            return None
        store = self.predictor.store
        family = Family({self.line[place]: store.get(self._sized(place)) for place in near})
        if not family.alike():
            return None
        low, high = self.low, self.high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._survives(family, middle) else (low, middle)
        # The same again, as `fit` answers: it looks for the smallest cap survived, to some MiB.
        if low == self.low and self._would_fit(family, low + 1):
            return low + 1
        return low

    def _survives(self, family: Family, place: int) -> bool:
        """Whether the step at a place runs through under the cap that decides."""
        from lora_advisor.models.allocator import replay
        from lora_advisor.models.replayed import recording, staged

        trace = family.at(self.line[place])
        # The sizes before rounding: a lower bound of what is live.
        if trace is None or int(trace.sizes.cumsum().max(initial=0)) > self._decisive_cap:
            return False
        expandable = self.config.allocator == "expandable_segments"
        return replay(
            staged(trace),
            cap_bytes=self._decisive_cap,
            expandable=expandable,
            recorded=recording(trace),
        ).survived

    @cached_property
    def _decisive_cap(self) -> int:
        """The largest cap of the allocator that, were it needed, would still fit for certain."""
        model, limit = self.predictor.memory, self.predictor.limit_bytes
        memory = self.predictor.predict(self._sized(self.traced[0])).memory
        low, high = 0, limit
        while high - low > 1:
            middle = (low + high) // 2
            needing = dataclasses.replace(memory, needed_bytes=middle)
            fits = model.verdict(self.config, needing, limit) == "fits"
            low, high = (middle, high) if fits else (low, middle)
        return low

    def _would_fit(self, family: Family, place: int) -> bool:
        from lora_advisor.models.replayed import traced_memory

        trace, sized = family.at(self.line[place]), self._sized(place)
        if trace is None:
            return False
        memory, limit = self.predictor.memory, self.predictor.limit_bytes
        came_to = traced_memory(
            trace,
            expandable=sized.allocator == "expandable_segments",
            cap_bytes=limit - memory.context.value_bytes,
        )
        return memory.verdict(sized, memory.predict(came_to, sized), limit) == "fits"

    def _guessed(self) -> int:
        """Return where the border lies if all that is no model state grows with the tokens."""
        if len(self.traced) > _GUESSES:
            return (self.low + self.high) // 2
        last = self.traced[-1]
        memory = self.predictor.predict(self._sized(last)).memory
        constant = sum(memory.components.get(name, 0) for name in _CONSTANT)
        room = self.predictor.limit_bytes - self.predictor.memory.context.upper_bytes - constant
        batch, length = self.line[last]
        tokens = batch * length * room / max(1, memory.needed_bytes - constant)
        return sum(1 for b, s in self.line if b * s <= tokens) - 1
