"""Will it fit? The answer for one configuration, and what would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lora_advisor.advisor.predictor import Predictor
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import UsageError
from lora_advisor.probes.prediction import Prediction

#: `fit`'s exit code for each verdict.
EXIT_CODES = {"fits": 0, "does not fit": 1, "uncertain": 2}


@dataclass(frozen=True, kw_only=True)
class Change:
    """One change of a configuration, and what it brings.

    Attributes:
        name: For people.
        config: The configuration after the change.
        prediction: What is expected of it.
        saved_bytes: By how much the bound of the process falls.
        slower: Share of the speed it costs; negative where it is faster, None where unknown.
    """

    name: str
    config: RunConfig
    prediction: Prediction
    saved_bytes: int
    slower: float | None


@dataclass(frozen=True, kw_only=True)
class FitAnswer:
    """The answer to "will it fit?".

    Attributes:
        config: What was asked.
        prediction: What is expected of it; its `verdict` is the answer.
        limit_bytes: What the process may hold.
        changes: Changes that make it fit, cheapest first, where it does not for certain.
        combined: The last of several changes taken together, where none does alone; else None.
    """

    config: RunConfig
    prediction: Prediction
    limit_bytes: int
    changes: tuple[Change, ...]
    combined: Change | None

    @property
    def exit_code(self) -> int:
        """0 fits, 1 does not, 2 uncertain."""
        return EXIT_CODES[self.prediction.verdict]


def will_it_fit(config: RunConfig, predictor: Predictor) -> FitAnswer:
    """Answer for one configuration."""
    prediction = predictor.predict(config)
    changes: list[Change] = []
    combined = None
    if prediction.verdict != "fits":
        every = [_judge(name, changed, config, predictor) for name, changed in _mutations(config)]
        changes = [change for change in every if change.prediction.verdict == "fits"]
        changes.sort(key=_cost)
        if not changes:
            combined = _combine(config, predictor)
    return FitAnswer(
        config=config,
        prediction=prediction,
        limit_bytes=predictor.limit_bytes,
        changes=tuple(changes),
        combined=combined,
    )


def _cost(change: Change) -> tuple[bool, float, int]:
    """Order changes: known cost first, the least first, then what saves most."""
    return (change.slower is None, change.slower or 0.0, -change.saved_bytes)


def _judge(name: str, changed: RunConfig, config: RunConfig, predictor: Predictor) -> Change:
    before, after = predictor.predict(config), predictor.predict(changed)
    slower = None
    if before.tokens_per_s is not None and after.tokens_per_s is not None:
        slower = 1 - after.tokens_per_s.value / before.tokens_per_s.value
    saved = before.memory.process_upper_bytes - after.memory.process_upper_bytes
    return Change(name=name, config=changed, prediction=after, saved_bytes=saved, slower=slower)


def _mutations(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Return each single change that may save memory and keeps what is trained the same."""
    steps: list[tuple[str, dict[str, object]]] = []
    if config.fp32_upcast:
        steps.append(("no fp32 upcast", {"fp32_upcast": False}))
    if config.trainer != "trl":
        steps.append(("TRL's trainer with its fused loss", {"trainer": "trl", "loss": "fused"}))
    if config.precision == "fp32":
        steps.append(("bf16", {"precision": "bf16"}))
    if config.allocator == "default":
        steps.append(("expandable segments", {"allocator": "expandable_segments"}))
    if config.optimizer != "paged_adamw_8bit":
        steps.append(("optimizer paged_adamw_8bit", {"optimizer": "paged_adamw_8bit"}))
    if config.checkpoint_every != 1:
        steps.append(("checkpointing of every layer", {"checkpointing": "full"}))
    if config.checkpointing != "offload":
        steps.append(("checkpoints held in host memory", {"checkpointing": "offload"}))
    if config.method == "lora":
        steps.append(("4-bit base weights (QLoRA)", {"method": "qlora"}))
    size = config.micro_batch
    while size > 1:
        half = next(n for n in range(size - 1, 0, -1) if size % n == 0)
        size = half
        accumulation = config.accumulation * config.micro_batch // size
        steps.append(
            (
                f"micro-batch {size} x accumulation {accumulation}, same effective batch",
                {"micro_batch": size, "accumulation": accumulation},
            )
        )
    for name, change in steps:
        try:
            yield name, config.replace(**change)
        except UsageError:
            continue


def _combine(config: RunConfig, predictor: Predictor) -> Change | None:
    """Take the change that saves most, again and again, until the result fits."""
    names: list[str] = []
    current = config
    for _ in range(8):
        options = [_judge(name, c, current, predictor) for name, c in _mutations(current)]
        best = max(options, key=lambda change: change.saved_bytes, default=None)
        if best is None or best.saved_bytes <= 0:
            return None
        names.append(best.name)
        current = best.config
        if best.prediction.verdict == "fits":
            return _judge("; ".join(names), current, config, predictor)
    return None
