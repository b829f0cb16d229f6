"""A card that is not there, whose speed and memory follow a formula with known effects."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_advisor.probes.architectures import Architecture
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import BusyError
from lora_advisor.probes.machine import GIB, Machine, Stack
from lora_advisor.probes.record import ProbeResult, append_record

MACHINE = Machine(
    kind="cuda", name="NVIDIA Example", memory_bytes=8 * GIB, driver="1.0", capability="8.9"
)

#: Effects on log tokens/s.
METHOD = {"lora": 0.0, "qlora": -0.20}
OPTIMIZER = {"adamw_torch": 0.0, "adamw_torch_fused": 0.03, "paged_adamw_8bit": -0.02}
PRECISION = {"fp16": 0.0, "bf16": 0.01, "fp32": -0.5}
SIZE = {"1x512": 0.0, "2x512": 0.30, "2x1024": 0.35, "2x2048": 0.45}
#: Only at the smallest size: the optimizer's time is then a large part of a step.
PAGED_AT_1X512 = -0.10


def log_speed(config: RunConfig) -> float:
    """Return the true log tokens/s."""
    size = f"{config.micro_batch}x{config.seq_len}"
    paged = config.optimizer == "paged_adamw_8bit" and size == "1x512"
    return (
        math.log(1000)
        + METHOD[config.method]
        + OPTIMIZER[config.optimizer]
        + PRECISION[config.precision]
        + SIZE[size]
        + (PAGED_AT_1X512 if paged else 0.0)
    )


def allocated_gib(config: RunConfig) -> float:
    """Return the true peak of live tensors."""
    base = 3.5 if config.method == "lora" else 1.5
    states = -0.25 if config.optimizer == "paged_adamw_8bit" else 0.0
    return base + states + config.tokens / 1024


class FakeCard:
    """Answers a configuration from the formula, and notes what it was asked.

    Attributes:
        probed: Configurations, in order.
        ends: How a configuration ends, where not well.
        busy_after: Runs after which another process takes the card; None for never.
    """

    def __init__(
        self,
        architecture: Architecture,
        stack: Stack,
        *,
        record: Path | None = None,
        noise: float = 0.005,
        drift: float = 0.0,
        ends: Callable[[RunConfig], str] = lambda config: "ok",
        busy_after: int | None = None,
        machine: Machine = MACHINE,
    ) -> None:
        self.architecture, self.stack, self.machine = architecture, stack, machine
        self.record, self.noise, self.drift = record, noise, drift
        self.ends, self.busy_after = ends, busy_after
        self.probed: list[RunConfig] = []
        self.random = random.Random(7)

    def __call__(self, config: RunConfig) -> ProbeResult:
        """Probe."""
        if self.busy_after is not None and len(self.probed) >= self.busy_after:
            raise BusyError("The GPU must be free while a probe is timed, but process 1 uses it.")
        self.probed.append(config)
        result = self.answer(config)
        if self.record is not None:
            append_record(self.record, result)
        return result

    def answer(self, config: RunConfig) -> ProbeResult:
        """Return what came of a configuration."""
        known: dict[str, Any] = {
            "config": config,
            "architecture": self.architecture.fingerprint,
            "hf_config": dict(self.architecture.hf_config),
            "machine": self.machine,
            "stack": self.stack,
            "cap_bytes": 7 * GIB,
            "started_at": "2026-11-25T10:00:00+00:00",
        }
        ending = self.ends(config)
        if ending not in ("ok", "contended"):
            return ProbeResult(outcome=ending, detail=f"it is said to be {ending}", **known)
        log = log_speed(config) + self.random.gauss(0, self.noise)
        log += self.drift * len(self.probed)  # a card that warms up
        step_s = config.tokens_per_step / math.exp(log)
        allocated = int(allocated_gib(config) * GIB)
        return ProbeResult(
            outcome="ok",
            allocated_bytes=allocated,
            reserved_bytes=allocated + GIB // 8,
            process_bytes=allocated + GIB // 2,
            step_times_s=(step_s, step_s, step_s),
            tokens_per_step=config.tokens_per_step,
            joules=3 * step_s * 95.0,
            energy_source="counter",
            contended=ending == "contended",
            **known,
        )
