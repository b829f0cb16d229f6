"""Will it fit? The answer for one configuration, and what would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lora_advisor.advisor.largest import Largest, largest
from lora_advisor.advisor.predictor import Predictor
from lora_advisor.advisor.proof import Probe, Proof, prove, run_instead
from lora_advisor.probes.architectures import has_own_head
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import UntraceableError, UsageError
from lora_advisor.probes.prediction import Prediction
from lora_advisor.probes.record import ProbeResult

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
        largest: The largest sizes that fit; None where it was not asked for or cannot be traced.
        measured: The run that settled the answer on a card; None where none was needed.
        note: What kept a run from settling it, or why it was run; None where nothing is to be said.
    """

    config: RunConfig
    prediction: Prediction
    limit_bytes: int
    changes: tuple[Change, ...] = ()
    combined: Change | None = None
    largest: Largest | None = None
    measured: ProbeResult | None = None
    note: str | None = None

    @property
    def exit_code(self) -> int:
        """0 fits, 1 does not, 2 uncertain."""
        return EXIT_CODES[self.prediction.verdict]

    @property
    def context_bytes(self) -> int:
        """What the process holds beside the allocator's memory."""
        return self.prediction.memory.process_bytes - self.prediction.memory.reserved_bytes

    @property
    def least_bytes(self) -> int:
        """The least the process gets by with, giving cached memory back where it must."""
        return self.prediction.memory.needed_bytes + self.context_bytes


def will_it_fit(
    config: RunConfig,
    predictor: Predictor,
    *,
    probe: Probe | None = None,
    sizes: bool = False,
) -> FitAnswer:
    """Answer for one configuration.

    Args:
        config: What is asked.
        predictor: What is known of the model on the card.
        probe: Runs a configuration on the card under the limit, to settle what the trace cannot;
            None to predict only.
        sizes: Whether to look for the largest sizes that fit, too.

    Raises:
        UntraceableError: The step cannot be traced, and nothing runs it.
    """
    limit = predictor.limit_bytes
    try:
        prediction = predictor.predict(config)
    except UntraceableError as error:
        if probe is None:
            raise
        ran = run_instead(config, probe, error)
        return FitAnswer(config=config, limit_bytes=limit, **vars(ran))
    proof = Proof(prediction)
    if prediction.verdict == "uncertain" and probe is not None:
        proof = prove(config, prediction, probe)
    changes: tuple[Change, ...] = ()
    combined = None
    if proof.prediction.verdict != "fits":
        changes, combined = _changes(config, predictor)
    return FitAnswer(
        config=config,
        limit_bytes=limit,
        changes=changes,
        combined=combined,
        # What is compiled as a whole never fits for certain.
        largest=largest(config, predictor) if sizes and config.compile != "model" else None,
        **vars(proof),
    )


def _changes(config: RunConfig, predictor: Predictor) -> tuple[tuple[Change, ...], Change | None]:
    """Return the changes that make it fit, cheapest first, or else several taken together."""
    mutations = list(_mutations(config, predictor))
    predictor.prepare(changed for _, changed in mutations)
    every = [_judge(name, changed, config, predictor) for name, changed in mutations]
    changes = [change for change in every if change.prediction.verdict == "fits"]
    changes.sort(key=_cost)
    return tuple(changes), None if changes else _combine(config, predictor)


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


def _mutations(config: RunConfig, predictor: Predictor) -> Iterator[tuple[str, RunConfig]]:
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
    if config.embedding == "device" and has_own_head(predictor.store.architecture):
        steps.append(("input embeddings held in host memory", {"embedding": "host"}))
    if config.optimizer != "paged_adamw_8bit":
        steps.append(("optimizer paged_adamw_8bit", {"optimizer": "paged_adamw_8bit"}))
    if config.checkpoint_every != 1:
        steps.append(("checkpointing of every layer", {"checkpointing": "full"}))
    if config.checkpointing != "offload":
        steps.append(
            ("checkpoints held in host memory", {"checkpointing": "offload", "cuda_graph": "off"})
        )
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
        mutations = list(_mutations(current, predictor))
        predictor.prepare(changed for _, changed in mutations)
        options = [_judge(name, c, current, predictor) for name, c in mutations]
        best = max(options, key=lambda change: change.saved_bytes, default=None)
        if best is None or best.saved_bytes <= 0:
            return None
        names.append(best.name)
        current = best.config
        if best.prediction.verdict == "fits":
            return _judge("; ".join(names), current, config, predictor)
    return None
