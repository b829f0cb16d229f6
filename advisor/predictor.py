"""What is known of a model on a card, and what it says of a configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_advisor.advisor.trace_cache import TraceCache
from lora_advisor.advisor.traces import TraceStore
from lora_advisor.models.energy import EnergyModel
from lora_advisor.models.engine import EngineSpeed, engine_memory
from lora_advisor.models.memory import Context, MemoryModel, Observed, context_of, graph_bytes
from lora_advisor.models.throughput import Observation, StepTime, ThroughputModel
from lora_advisor.models.traced import TracedMemory
from lora_advisor.probes.architectures import Architecture
from lora_advisor.probes.cards import Card
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.events import Work
from lora_advisor.probes.figures import count_layers
from lora_advisor.probes.machine import GIB, Machine
from lora_advisor.probes.plan import Candidate
from lora_advisor.probes.prediction import Prediction
from lora_advisor.probes.record import ProbeResult
from lora_advisor.probes.unsloth import stand_in

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
        energy: Energy model; None while nothing is known of the device's power.
        results: The probes behind the models.
        elsewhere: The machine whose runs taught the models of a card that is not here; None for
            none. They are no `results`.
        engine: How much faster than its stand-in another engine is.
    """

    store: TraceStore
    machine: Machine
    card: Card | None
    limit_bytes: int
    memory: MemoryModel
    throughput: ThroughputModel | None
    energy: EnergyModel | None
    results: tuple[ProbeResult, ...] = ()
    elsewhere: Machine | None = None
    engine: EngineSpeed = field(default_factory=EngineSpeed)

    @classmethod
    def start(
        cls,
        architecture: Architecture,
        machine: Machine,
        card: Card | None,
        *,
        limit_bytes: int,
        context_bytes: int | None = None,
        cache: Path | None = None,
    ) -> Predictor:
        """Return the models before any probe.

        Args:
            architecture: The model's figures.
            machine: The device.
            card: Its row in the card table; None if it has none.
            limit_bytes: What the process may hold on it.
            context_bytes: What a process holds on it before its first tensor, where measured.
            cache: File that keeps what traces came to; None to keep nothing.
        """
        capability = machine.capability
        context = _CPU_CONTEXT if machine.kind == "cpu" else context_of(capability, context_bytes)
        throughput = None if card is None else ThroughputModel.roofline(card)
        energy = None if card is None else EnergyModel.of_board(card.tdp_w)
        memory = MemoryModel(capability, context)
        store = TraceStore(architecture, capability, TraceCache(cache))
        return cls(store, machine, card, limit_bytes, memory, throughput, energy)

    @property
    def is_roofline(self) -> bool:
        """Whether speeds are a card's figures alone: none is here, and no run of one was told."""
        return self.machine.kind == "card" and self.elsewhere is None

    def learn(self, results: Sequence[ProbeResult]) -> Predictor:
        """Return models taught by all probes so far, these included."""
        every = self.results + tuple(results)
        ran = [r for r in every if r.outcome == "ok" and r.config.is_buildable]
        changes: dict[str, object] = {"results": every}
        if ran:
            throughput = ThroughputModel.fit(self.card, [self._observed(r) for r in ran])
            changes["throughput"] = throughput
            changes["energy"] = self._learnt_energy(throughput, ran)
            changes["memory"] = self._learnt_memory([r for r in ran if self.is_whole(r)])
        taught = dataclasses.replace(self, **changes)  # type: ignore[arg-type]
        return dataclasses.replace(taught, engine=taught._learnt_engine())

    def _learnt_engine(self) -> EngineSpeed:
        """Return how fast another engine is beside what the models, as they are, say."""
        seen = []
        for result in self.results:
            if result.config.is_buildable or not self.is_whole(result) or result.step_s is None:
                continue
            expected = self._time_of_stand_in(result.config, self.work)
            if expected is not None:
                seen.append((expected.value, result.step_s))
        return EngineSpeed.fit(seen)

    def learn_elsewhere(self, results: Sequence[ProbeResult], machine: Machine) -> Predictor:
        """Return models taught by runs of such a card in another machine, none of them a probe."""
        taught = self.learn(results)
        return dataclasses.replace(taught, results=self.results, elsewhere=machine)

    def is_whole(self, result: ProbeResult) -> bool:
        """Whether a probe ran all layers of the model."""
        return result.architecture == self.store.architecture.fingerprint

    def _observed(self, result: ProbeResult) -> Observation:
        assert result.step_s is not None
        work = self._work_of(result)
        return Observation(config=result.config, work=work, step_s=result.step_s)

    def _work_of(self, result: ProbeResult) -> Work:
        """Return what a probe did, some of whose layers may have been left out."""
        layers = 1.0
        if not self.is_whole(result):
            ran, of = count_layers(result.hf_config), self.store.architecture.num_layers
            layers = 1.0 if ran is None or not of else ran / of
        return self.store.work(result.config).step(result.config.accumulation, layers)

    def _learnt_energy(
        self, throughput: ThroughputModel, ran: Sequence[ProbeResult]
    ) -> EnergyModel | None:
        observed = [
            (
                throughput.time(r.config, self._work_of(r)),
                r.step_s,
                r.joules / len(r.step_times_s),
            )
            for r in ran
            if r.joules and r.step_s and r.energy_source in ("counter", "sampled", None)
        ]
        return EnergyModel.fit(observed) if observed else self.energy

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
        measured = [
            r.context_bytes - graph_bytes(r.config) for r in ran if r.context_bytes is not None
        ]
        context = context_of(None, max(measured)) if measured else model.context
        return MemoryModel.fit(model.capability, context, observed)

    @property
    def cap_bytes(self) -> int:
        """What is left for the allocator."""
        return self.limit_bytes - self.memory.context.value_bytes

    def _traced(self, config: RunConfig) -> TracedMemory:
        return self.store.memory(config, self.cap_bytes)

    def prepare(self, configs: Iterable[RunConfig], ahead: Sequence[RunConfig] = ()) -> None:
        """Trace what these configurations need, several at a time.

        Cores that would be idle meanwhile take what is asked for `ahead`.
        """
        self.store.prepare(configs, self.cap_bytes, ahead)

    def work(self, config: RunConfig) -> Work:
        """Return the work of one optimizer step."""
        return self.store.work(config).step(config.accumulation)

    def time(self, config: RunConfig) -> StepTime | None:
        """Return the time of one optimizer step; None where it is not known.

        The time that offloaded checkpoints take to go to the host and back is not modelled.
        """
        return self.time_of(config, self.work)

    def time_of(self, config: RunConfig, work_of: Callable[[RunConfig], Work]) -> StepTime | None:
        """Return the same where the work of a step is known otherwise than by its trace."""
        if not config.is_buildable:
            expected = self._time_of_stand_in(config, work_of)
            return None if expected is None else self.engine.of(expected)
        if self.throughput is None or config.checkpointing == "offload":
            return None
        return self.throughput.time(config, work_of(config))

    def _time_of_stand_in(
        self, config: RunConfig, work_of: Callable[[RunConfig], Work]
    ) -> StepTime | None:
        if self.throughput is None:
            return None
        like = stand_in(config)
        if like.checkpointing == "offload":
            like = like.replace(
                checkpointing="full", quant_type=like.quant_type, double_quant=like.double_quant
            )
        return self.throughput.time(like, work_of(config))

    def predict(self, config: RunConfig) -> Prediction:
        """Return what one configuration needs and reaches."""
        memory = self.memory.predict(self._traced(config), config)
        if not config.is_buildable:
            # Its stand-in was traced; its own probes teach its speed alone.
            memory = dataclasses.replace(engine_memory(memory), evidence="traced")
        verdict = self.memory.verdict(config, memory, self.limit_bytes)
        step = speed = energy = None
        time = self.time(config)
        if time is not None:
            tokens = config.tokens_per_step
            step = time.interval
            speed = step.reciprocal(tokens)
            if self.energy is not None:
                energy = self.energy.joules(time).scaled(1 / tokens)
        evidence = (
            "probed" if self.results and self.throughput and self.throughput.probes else "traced"
        )
        if not config.is_buildable and not self.engine.probes:
            evidence = "traced"  # its stand-in was, and nothing is known of itself
        if self.elsewhere is not None:
            evidence = "probed elsewhere"
            memory = dataclasses.replace(memory, evidence=evidence)
        return Prediction(
            memory=memory,
            verdict=verdict,
            step_s=step,
            tokens_per_s=speed,
            evidence=evidence,
            joules_per_token=energy,
            energy_source=None if energy is None or self.energy is None else self.energy.source,
        )

    def result_of(self, config: RunConfig) -> ProbeResult | None:
        """Return the probe of exactly this configuration; the last one if there are several."""
        return next(
            (r for r in reversed(self.results) if r.config == config and self.is_whole(r)), None
        )

    def candidate(self, config: RunConfig, reason: str | None = None) -> Candidate:
        """Return a configuration with all that is known of it."""
        return Candidate(
            config=config,
            prediction=self.predict(config),
            measured=self.result_of(config),
            reason=reason,
        )
