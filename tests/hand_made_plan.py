"""A plan for the CPU that is here, made by hand: no search, no probe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_advisor.probes.architectures import resolve_architecture
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.machine import GIB, cpu_machine, detect_stack
from lora_advisor.probes.plan import Candidate, Plan, write_plan
from lora_advisor.probes.prediction import MemoryPrediction, Prediction
from lora_advisor.probes.spec import Spec


def save_plan(config: RunConfig, path: Path, **changes: Any) -> None:
    """Write a plan whose choice is a configuration; `changes` are fields of the spec."""
    memory = MemoryPrediction(
        allocated_bytes=GIB, reserved_bytes=GIB, process_bytes=2 * GIB, process_upper_bytes=2 * GIB,
        needed_bytes=GIB, instant="backward", components={}, phases={}, evidence="traced",
    )  # fmt: skip
    chosen = Candidate(
        config=config,
        prediction=Prediction(
            memory=memory, verdict="fits", step_s=None, tokens_per_s=None, evidence="traced"
        ),
    )
    spec = Spec(
        model=config.model,
        vram_bytes=4 * GIB,
        seq_len=config.seq_len,
        effective_batch=config.micro_batch * config.accumulation * changes.get("gpus", 1),
        device="cpu",
        **changes,
    )
    plan = Plan(
        spec=spec, machine=cpu_machine(), stack=detect_stack(),
        architecture=resolve_architecture(config.model), chosen=chosen, baseline=None,
        runners_up=(), rejected=(), excluded=(), cap_bytes=None, context_bytes=None, probes=0,
        reused=0, probing_s=0.0, wall_s=0.0, trials=0,
    )  # fmt: skip
    write_plan(path, plan)
