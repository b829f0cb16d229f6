"""What is known of a model on a card, and what it says of a configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_advisor.advisor.trace_cache import TraceCache
from lora_advisor.advisor.traces import TraceStore
from lora_advisor.models.memory import Context, MemoryModel, Observed, context_of
from lora_advisor.models.throughput import Observation, ThroughputModel
from lora_advisor.models.traced import TracedMemory
from lora_advisor.probes.architectures import Architecture
from lora_advisor.probes.cards import Card
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.events import Work
from lora_advisor.probes.machine import GIB, Machine
from lora_advisor.probes.plan import Candidate
from lora_advisor.probes.prediction import Prediction
from lora_advisor.probes.record import ProbeResult

#: What Python and its libraries hold on a CPU before the model does: measured 0.6 GiB after the
#: imports (facts of the packages) and what training adds; probes replace it.
_CPU_CONTEXT = Context(value_bytes=GIB, upper_bytes=2 * GIB, measured=False)


@dataclass(frozen=True)
class Predictor:
    """Models of one architecture on one card, as far as probes have taught them.

    Attributes:
        store: Traces.
        machine: The device.
        card: Its row in the card table; None if it has none.
        limit_bytes: What the process may hold on it.
        memory: Memory model.
        throughput: Throughput model; None while nothing is known of the device.
        results: The probes behind the models.
    """

    store: TraceStore
    machine: Machine
    card: Card | None
    limit_bytes: int
    memory: MemoryModel
    throughput: ThroughputModel | None
    results: tuple[ProbeResult, ...] = ()

    @classmethod
    def start(
        cls,
        architecture: Architecture,
        machine: Machine,
        card: Card | None,
        *,
        limit_bytes: int,
        precision: str,
        context_bytes: int | None = None,
        cache: Path | None = None,
    ) -> Predictor:
        """Return the models before any probe.

        Args:
            architecture: The model's figures.
            machine: The device.
            card: Its row in the card table; None if it has none.
            limit_bytes: What the process may hold on it.
            precision: What the matrix products run in.
            context_bytes: What a process holds on it before its first tensor, where measured.
            cache: File that keeps what traces came to; None to keep nothing.
        """
        capability = machine.capability
        context = _CPU_CONTEXT if machine.kind == "cpu" else context_of(capability, context_bytes)
        throughput = None if card is None else ThroughputModel.roofline(card, precision)
        memory = MemoryModel(capability, context)
        store = TraceStore(architecture, capability, TraceCache(cache))
        return cls(store, machine, card, limit_bytes, memory, throughput)

    def learn(self, results: Sequence[ProbeResult]) -> Predictor:
        """Return models taught by all probes so far, these included."""
        every = self.results + tuple(results)
        ran = [r for r in every if r.outcome == "ok" and r.config.is_buildable]
        changes: dict[str, object] = {"results": every}
        if ran:
            changes["throughput"] = ThroughputModel.fit(self.card, [self._observed(r) for r in ran])
            changes["memory"] = self._learnt_memory(ran)
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def _observed(self, result: ProbeResult) -> Observation:
        assert result.step_s is not None
        work = self.work(result.config)
        return Observation(config=result.config, work=work, step_s=result.step_s)

    def _learnt_memory(self, ran: Sequence[ProbeResult]) -> MemoryModel:
        model = MemoryModel(self.memory.capability, self.memory.context)
        if self.machine.kind == "cpu":
            held = [
                result.process_bytes - self._traced(result.config).reserved_bytes
                for result in ran
                if result.process_bytes is not None
            ]
            if not held:
                return model
            context = Context(
                value_bytes=max(0, sorted(held)[len(held) // 2]),
                upper_bytes=max(0, *held),
                measured=True,
            )
            return MemoryModel(None, context, probes=len(held))
        observed = [
            Observed(
                traced=self._traced(r.config),
                allocated_bytes=r.allocated_bytes,
                reserved_bytes=r.reserved_bytes,
            )
            for r in ran
            if r.allocated_bytes is not None
            and r.reserved_bytes is not None
            and not r.alloc_retries
            and r.config.compile == "off"
        ]
        measured = [r.context_bytes for r in ran if r.context_bytes is not None]
        context = context_of(None, max(measured)) if measured else model.context
        return MemoryModel.fit(model.capability, context, observed)

    def _traced(self, config: RunConfig) -> TracedMemory:
        return self.store.memory(config, self.limit_bytes - self.memory.context.value_bytes)

    def prepare(self, configs: Iterable[RunConfig]) -> None:
        """Trace what these configurations need, several at a time."""
        self.store.prepare(configs, self.limit_bytes - self.memory.context.value_bytes)

    def work(self, config: RunConfig) -> Work:
        """Return the work of one optimizer step."""
        once, each = self.store.work(config)
        return once + each.times(config.accumulation)

    def predict(self, config: RunConfig) -> Prediction:
        """Return what one configuration needs and reaches."""
        memory = self.memory.predict(self._traced(config), config)
        verdict = self.memory.verdict(config, memory, self.limit_bytes)
        step = speed = None
        # The time that offloaded checkpoints take to go to the host and back is not modelled.
        if self.throughput is not None and config.checkpointing != "offload":
            work = self.work(config)
            step = self.throughput.step(config, work)
            speed = self.throughput.tokens_per_s(config, work)
        evidence = (
            "probed" if self.results and self.throughput and self.throughput.probes else "traced"
        )
        return Prediction(
            memory=memory, verdict=verdict, step_s=step, tokens_per_s=speed, evidence=evidence
        )

    def result_of(self, config: RunConfig) -> ProbeResult | None:
        """Return the probe of exactly this configuration; the last one if there are several."""
        return next((r for r in reversed(self.results) if r.config == config), None)

    def candidate(self, config: RunConfig, reason: str | None = None) -> Candidate:
        """Return a configuration with all that is known of it."""
        return Candidate(
            config=config,
            prediction=self.predict(config),
            measured=self.result_of(config),
            reason=reason,
        )
