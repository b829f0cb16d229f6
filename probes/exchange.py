"""What a probe's parent and child tell each other: a `Request` and an `Answer`, each a file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from lora_advisor.probes.architectures import Architecture
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import UsageError

#: The first step compiles and makes the optimizer's states; the second is like all others.
LEAST_WARMUP_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the child shall run.

    Attributes:
        config: The configuration.
        architecture: The model's figures, and where its weights are.
        device: "cuda" or "cpu".
        cap_bytes: Bytes the CUDA allocator may take; None for no cap. On a CPU
            the parent keeps it.
        warmup_steps: Steps before the measured ones, at least two.
        measured_steps: Steps to measure.
        max_seconds: Stop measuring after this time, once there are three steps.
        parent_pid: The process without which the child has no reason to live; None for none.
    """

    config: RunConfig
    architecture: Architecture
    device: str
    cap_bytes: int | None = None
    warmup_steps: int = 3
    measured_steps: int = 6
    max_seconds: float = 20.0
    parent_pid: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        if self.device not in ("cuda", "cpu"):
            raise UsageError(
                f'`device` must be "cuda" or "cpu" for a probe, but got {self.device!r}.'
            )
        if self.warmup_steps < LEAST_WARMUP_STEPS:
            raise UsageError(
                f"`warmup_steps` must be at least {LEAST_WARMUP_STEPS}, so that the optimizer's "
                f"states exist before anything is measured, but got {self.warmup_steps}."
            )
        if self.measured_steps < 1:
            raise UsageError(f"`measured_steps` must be at least 1, but got {self.measured_steps}.")
        if self.cap_bytes is not None and self.cap_bytes <= 0:
            raise UsageError(f"`cap_bytes` must be above 0, but got {self.cap_bytes}.")

    def write(self, path: Path) -> None:
        """Write the JSON form."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        data["config"] = self.config.to_json()
        data["architecture"] = {
            **dataclasses.asdict(self.architecture),
            "hf_config": dict(self.architecture.hf_config),
        }
        path.write_text(json.dumps(data), "utf-8")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the JSON form."""
        data = json.loads(path.read_text("utf-8"))
        data["config"] = RunConfig.from_json(data["config"])
        data["architecture"] = Architecture(**data["architecture"])
        return cls(**data)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """How the child ended and what it measured; the fields are those of `ProbeResult`."""

    outcome: str
    detail: str | None = None
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    process_bytes: int | None = None
    context_bytes: int | None = None
    model_bytes: int | None = None
    step_times_s: tuple[float, ...] = ()
    device_times_s: tuple[float, ...] = ()
    host_times_s: tuple[float, ...] = ()
    warmup_s: float | None = None
    startup_s: float | None = None
    tokens_per_step: int | None = None
    joules: float | None = None
    power_w: float | None = None
    energy_source: str | None = None
    sm_clock_mhz: int | None = None
    sm_clock_max_mhz: int | None = None
    temperature_c: int | None = None
    throttled: tuple[str, ...] | None = None
    unstable: bool | None = None
    alloc_retries: int | None = None
    attention_backend: str | None = None
    trainable: int | None = None

    def write(self, path: Path) -> None:
        """Write the JSON form so that a reader finds all of it or nothing."""
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(dataclasses.asdict(self)), "utf-8")
        draft.replace(path)

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Read the JSON form; None if there is no file."""
        if not path.exists():
            return None
        data = json.loads(path.read_text("utf-8"))
        values: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in data.items()
        }
        return cls(**values)
