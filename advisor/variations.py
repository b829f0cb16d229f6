"""Which other knobs of the best arms are worth a look."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

from lora_advisor.advisor.predictor import Predictor
from lora_advisor.advisor.seen import Seen
from lora_advisor.advisor.space import Space
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import UsageError
from lora_advisor.probes.plan import Candidate

#: Knobs that move memory and speed less than the others, and how many of their values are looked at
#: in every arm; the rest only around the best arms.
EVERYWHERE = {
    "optimizer": 1, "precision": 1, "attention": 1, "allocator": 1, "embedding": 1,
    "cuda_graph": 1,
    "trainer": 1, "checkpointing": 3,
}  # fmt: skip
_ARMS_VARIED = 2
#: What `Seen.speed_at_most` says may be off by, as a factor: 1.001 for Qwen2.5-1.5B on an RTX 4060
#: and an H100 at micro-batches of 1 to 4, more where layers are few.
_BETWEEN = 1.02


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
    """Return the best arms with one more knob changed, larger micro-batches included.

    Those arms need not fit: what is changed may be what lets them.
    """
    choices = []
    arms: list[RunConfig] = []
    for candidate in best:
        arm = candidate.config.replace(**{seen.size: 2}, accumulation=1)
        if arm in arms or len(arms) == _ARMS_VARIED:
            continue
        arms.append(arm)
        known = {
            knob: values[0] if len(values) == 1 else getattr(candidate.config, knob)
            for knob, values in space.axes.items()
        }
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
    if best.prediction.verdict == "does not fit":
        return False
    speed = seen.speed_at_most(config)
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
    if any(changed[knob] != getattr(config, knob) for knob in ("precision", "embedding")):
        return same
    if changed["optimizer"] != config.optimizer and predictor.is_roofline:
        same = []
    if changed["optimizer"] != config.optimizer and next_:
        larger = legal(space, {**changed, "optimizer": config.optimizer, seen.size: next_[0]})
        least = None if larger is None else seen.least_bytes(larger, without=("optimizer",))
        if least is not None and least > predictor.cap_bytes:
            return same
    return next_ + same
