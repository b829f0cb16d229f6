"""A device that is not there: it answers probes from a formula and notes what it is asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_advisor.advisor.planning import make_plan
from lora_advisor.advisor.space import build_space
from lora_advisor.probes.architectures import resolve_architecture, with_layers
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import BusyError
from lora_advisor.probes.machine import GIB, cpu_machine, detect_stack
from lora_advisor.probes.plan import Plan
from lora_advisor.probes.record import ProbeResult, append_record
from lora_advisor.probes.spec import Spec

#: Tokens a second, by what decides them.
METHOD = {"lora": 1000.0, "qlora": 800.0, "full": 1.0}
CHECKPOINTING = {"off": 1.0, "every_4": 0.92, "every_2": 0.85, "full": 0.75}
MICRO_BATCH = {1: 0.7, 2: 0.9, 4: 1.0}
OPTIMIZER = {"adamw_torch_fused": 1.0}


def speed_of(config: RunConfig) -> float:
    """Return the tokens a second of a configuration."""
    trainer = 1.0 if config.trainer == "trl" else 0.6
    return (
        METHOD[config.method]
        * CHECKPOINTING[config.checkpointing]
        * MICRO_BATCH[config.micro_batch]
        * OPTIMIZER.get(config.optimizer, 0.97)
        * trainer
    )


class Device:
    """Answers from the formula; all but a twentieth of a step is its layers'.

    Attributes:
        asked: Configuration, layers and steps of each probe, in order.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        speed: Callable[[RunConfig], float] = speed_of,
        too_large: Callable[[RunConfig], bool] = lambda config: False,
        unstable: Callable[[RunConfig], bool] = lambda config: False,
        busy_after: int | None = None,
        record: Path | None = None,
    ) -> None:
        """Make a device.

        Args:
            spec: Of the plan that asks.
            speed: Tokens a second of a configuration.
            too_large: Whether one runs out of memory.
            unstable: Whether the steps of one vary.
            busy_after: Probes after which another process takes the device; None for never.
            record: File that answers go to.
        """
        self.spec, self.speed, self.too_large, self.unstable = spec, speed, too_large, unstable
        self.busy_after, self.record = busy_after, record
        self.asked: list[tuple[RunConfig, int | None, int]] = []
        self.architecture = resolve_architecture(spec.model)
        self.machine, self.stack = cpu_machine(), detect_stack()

    def __call__(self, config: RunConfig, layers: int | None, steps: int) -> ProbeResult:
        """Probe."""
        if len(self.asked) == self.busy_after:
            raise BusyError("The GPU must be free while a probe is timed.")
        self.asked.append((config, layers, steps))
        result = self.answer(config, layers, steps)
        if self.record is not None:
            append_record(self.record, result)
        return result

    @property
    def probed(self) -> list[RunConfig]:
        """Configurations that ran, in order."""
        return [config for config, _, _ in self.asked]

    def answer(self, config: RunConfig, layers: int | None, steps: int) -> ProbeResult:
        """Return what comes of a configuration."""
        ran, share = self.architecture, 1.0
        if layers is not None:
            assert ran.num_layers is not None
            share = 0.05 + 0.95 * layers / ran.num_layers
            ran = with_layers(ran, layers)
        known: dict[str, Any] = {
            "config": config,
            "architecture": ran.fingerprint,
            "hf_config": dict(ran.hf_config),
            "machine": self.machine,
            "stack": self.stack,
            "cap_bytes": self.spec.vram_bytes,
        }
        if self.too_large(config):
            return ProbeResult(outcome="out_of_memory", **known)
        step_s = share * config.tokens_per_step / self.speed(config)
        return ProbeResult(
            outcome="ok",
            process_bytes=GIB,
            step_times_s=(step_s,) * steps,
            tokens_per_step=config.tokens_per_step,
            unstable=self.unstable(config),
            **known,
        )

    def fastest(self, spec: Spec) -> float:
        """Return the speed of the best configuration that runs, found by asking for all."""
        space = build_space(spec, self.machine, self.stack, None)
        return max(self.speed(config) for config in space.configs() if not self.too_large(config))


def plan_with(device: Device, folder: Path, **changes: Any) -> Plan:
    """Plan on a device, the record in a folder, some fields of the spec changed."""
    options = {name: changes.pop(name) for name in _OPTIONS if name in changes}
    spec = dataclasses.replace(device.spec, **changes)
    return make_plan(spec, record=folder / "record.jsonl", probe=device, **options)


#: What is `make_plan`'s own.
_OPTIONS = ("say", "fresh", "own_record", "study_file")
