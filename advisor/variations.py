"""What the search has seen, and which other knobs of the best arms are worth a look."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_advisor.advisor.predictor import Predictor
from lora_advisor.advisor.space import Space
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import UsageError
from lora_advisor.probes.plan import Candidate

#: What is plain: taken where another is no faster.
PLAIN = {
    "optimizer": "adamw_torch_fused",
    "kernels": "none",
    "compile": "off",
}

#: Knobs that move memory and speed less than the others, and how many of their values are looked at
#: in every arm; the rest only around the best arms.
EVERYWHERE = {
    "optimizer": 1, "precision": 1, "attention": 1, "allocator": 1, "trainer": 1, "checkpointing": 3
}  # fmt: skip
_ARMS_VARIED = 2
#: What `Seen.speed_between` says may be off by, as a factor: 1.001 for Qwen2.5-1.5B on an RTX 4060
#: and an H100 at micro-batches of 1 to 4, more where layers are few.
_BETWEEN = 1.02


@dataclass
class Seen:
    """Candidates so far, and which sizes of an otherwise equal configuration they settle.

    What is smaller than one that fits is not better; what is larger than one that does not fit does
    not fit either. The size is the micro-batch, or the sequence length where that is sought.
    """

    size: str
    candidates: dict[RunConfig, Candidate] = field(default_factory=dict)
    fits: dict[RunConfig, int] = field(default_factory=dict)
    fails: dict[RunConfig, int] = field(default_factory=dict)
    _kin: dict[RunConfig, list[Candidate]] = field(default_factory=dict, repr=False)

    def add(self, candidate: Candidate) -> None:
        """Take a candidate up."""
        config, verdict = candidate.config, candidate.prediction.verdict
        self.candidates[config] = candidate
        self._kin.setdefault(_family(config), []).append(candidate)
        arm, size = self._arm(config), getattr(config, self.size)
        if verdict == "fits":
            self.fits[arm] = max(size, self.fits.get(arm, 0))
        elif verdict == "does not fit":
            self.fails[arm] = min(size, self.fails.get(arm, size))

    def settles(self, config: RunConfig) -> bool:
        """Whether a configuration need not be asked for."""
        arm, size = self._arm(config), getattr(config, self.size)
        fails = self.fails.get(arm)
        return size < self.fits.get(arm, 0) or (fails is not None and size > fails)

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

    def speed_between(self, config: RunConfig) -> float | None:
        """Return a configuration's speed as those that recompute less and more tell it.

        A step's time is linear in how many layers are recomputed. None where either is not known.
        """
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


def legal(space: Space, choice: dict[str, Any]) -> RunConfig | None:
    """Return the configuration of a choice; None where it is none, or another's second name."""
    if space.is_pointless(choice):
        return None
    with contextlib.suppress(UsageError):
        return space.config(choice)
    return None


def varied_choices(
    space: Space, best: Sequence[Candidate], seen: Seen, predictor: Predictor
) -> list[dict[str, Any]]:
    """Return the best arms with one more knob changed, larger micro-batches included."""
    choices = []
    arms: list[RunConfig] = []
    for candidate in best:
        arm = candidate.config.replace(**{seen.size: 2}, accumulation=1)
        if arm in arms or len(arms) == _ARMS_VARIED:
            continue
        arms.append(arm)
        known = {knob: getattr(candidate.config, knob) for knob in space.axes}
        for knob, everywhere in EVERYWHERE.items():
            for value in space.axes[knob][everywhere:]:
                changed = {**known, knob: value}
                choices += [
                    {**changed, seen.size: size}
                    for size in _sizes_to_try(space, candidate.config, changed, seen, predictor)
                    if not _is_slower({**changed, seen.size: size}, best[0], space, seen, predictor)
                ]
    return choices


def _is_slower(
    choice: dict[str, Any], best: Candidate, space: Space, seen: Seen, predictor: Predictor
) -> bool:
    """Whether a choice is no faster than the best by what is known of the same with other layers.

    That is a card's figures; and where length is sought, speed decides little.
    """
    config = legal(space, choice)
    if config is None or not predictor.is_roofline or seen.size == "seq_len":
        return False
    speed = seen.speed_between(config)
    if speed is None or best.tokens_per_s is None:
        return False
    return speed * _BETWEEN <= best.tokens_per_s


def _sizes_to_try(
    space: Space,
    config: RunConfig,
    changed: dict[str, Any],
    seen: Seen,
    predictor: Predictor,
) -> list[int]:
    """Return at which sizes a changed knob may be worth something, the largest first.

    As large as the configuration is, or the next size, if the knob can make room for that: another
    optimizer saves no more than the states of this one, and is no better at the same size by a
    card's figures.
    """
    size: int = changed[seen.size]
    same, next_ = [size], sorted(n for n in space.axes[seen.size] if n > size)[:1]
    other = config.replace(checkpointing=changed["checkpointing"])
    if other.checkpointing != config.checkpointing:
        keeps_more = (other.checkpoint_every or math.inf) > (config.checkpoint_every or math.inf)
        return same if keeps_more else next_
    if changed["precision"] != config.precision:
        return same
    if changed["optimizer"] != config.optimizer and predictor.is_roofline:
        same = []
    if changed["optimizer"] != config.optimizer and next_:
        larger = legal(space, {**changed, "optimizer": config.optimizer, seen.size: next_[0]})
        failed = None if larger is None else seen.candidates.get(larger)
        if failed is not None:
            memory = failed.prediction.memory
            if memory.needed_bytes - memory.components.get("optimizer", 0) > predictor.cap_bytes:
                return same
    return next_ + same
