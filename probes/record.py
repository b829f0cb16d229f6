"""`ProbeResult`: how one probe ended and what it measured; and the append-only file of them."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import DataError, OutputError, UsageError
from lora_advisor.probes.exchange import LEAST_WARMUP_STEPS
from lora_advisor.probes.machine import Machine, Stack
from lora_advisor.probes.nvml import POWER_CAP

#: Raised when a change of how things are measured makes old lines incomparable.
FORMAT = 1

OUTCOMES = ("ok", "out_of_memory", "failed", "timed_out", "interrupted")

_TIMES = ("step_times_s", "device_times_s", "host_times_s")


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """One probe: what ran, where, how it ended, what it measured. None is "unknown".

    Attributes:
        config: The configuration that ran.
        architecture: Fingerprint of the model's figures.
        hf_config: The figures themselves, so that a record can be refitted anywhere.
        machine: Where it ran.
        stack: With what it ran.
        outcome: One of OUTCOMES.
        detail: For people: the error's first line, or what is noteworthy of a run that ended well.
        cap_bytes: Bytes the device's allocator (on a CPU: the process) was allowed; None: no cap.
        allocated_bytes: Peak of live tensors (torch.cuda.max_memory_allocated).
        reserved_bytes: Peak held by the caching allocator (torch.cuda.max_memory_reserved).
        process_bytes: Peak of the process on the device by NVML; on a CPU its peak resident size.
        context_bytes: What the process holds on the device beside the allocator's memory.
        model_bytes: Allocated once the model stood and before the first step.
        step_times_s: Wall time of each measured step, warm-up left out.
        device_times_s: Time between CUDA events around the same steps.
        host_times_s: Time until Python had issued the same steps and went on to wait.
        warmup_s: Time of the steps before, compilation included.
        startup_s: From the start of the process to the first step.
        tokens_per_step: Tokens of one optimizer step, padding included.
        joules: Energy of the measured steps; None where they took less than half a second, too
            little to tell.
        power_w: Mean board power while measuring.
        energy_source: Where these two come from: "counter" (NVML's), "sampled" (NVML's power, asked
            for every 100 ms), or "board power" (the power limit times the time: an upper bound).
        sm_clock_mhz: Median clock of the multiprocessors while measuring.
        sm_clock_max_mhz: The highest that the card allows.
        temperature_c: Highest temperature of the chip while measuring.
        throttled: Why the clock was held down while measuring, as `nvml.throttle_reasons` says.
        unstable: Whether the step times vary too much for their median to be trusted.
        alloc_retries: Times the allocator gave back its cache and tried again.
        attention_backend: Attention kernel that ran, from the profiler.
        trainable: Number of trained parameters.
        contended: Whether another process used the device.
        started_at: UTC, ISO 8601.
        engine: Whose step ran, with its versions, where it was another engine's; None for ours.
    """

    config: RunConfig
    architecture: str
    hf_config: Mapping[str, Any]
    machine: Machine
    stack: Stack
    outcome: str
    detail: str | None = None
    cap_bytes: int | None = None
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
    contended: bool | None = None
    started_at: str | None = None
    engine: str | None = None

    @property
    def step_s(self) -> float | None:
        """Median wall time of a measured step, in seconds."""
        return statistics.median(self.step_times_s) if self.step_times_s else None

    @property
    def start_s(self) -> float:
        """Seconds that the first steps took over their later time: compilation, above all."""
        return max(0.0, (self.warmup_s or 0.0) - LEAST_WARMUP_STEPS * (self.step_s or 0.0))

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens (padding included) per second at the median step."""
        step = self.step_s
        return None if not step or self.tokens_per_step is None else self.tokens_per_step / step

    @property
    def joules_per_token(self) -> float | None:
        """Energy of a token; None where the energy is unknown."""
        if self.joules is None or not self.tokens_per_step or not self.step_times_s:
            return None
        return self.joules / (self.tokens_per_step * len(self.step_times_s))

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why the time is not to be trusted, and the probe worth a repeat; empty where it is.

        A clock that only the power limit holds down is the card's speed, and no doubt.
        """
        if self.outcome != "ok":
            return ()
        found = ["another process used the device"] if self.contended else []
        if self.unstable:
            found.append("the step times vary")
        held = [reason for reason in self.throttled or () if reason != POWER_CAP]
        return (*found, *(f"the clock was held down: {reason}" for reason in held))

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        data.update(
            config=self.config.to_json(),
            machine=self.machine.to_json(),
            stack=self.stack.to_json(),
            hf_config=dict(self.hf_config),
        )
        for name in (*_TIMES, "throttled"):
            data[name] = None if data[name] is None else list(data[name])
        if self.engine is None:  # older programs do not know it
            del data["engine"]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read the JSON form; fields of newer versions are dropped."""
        names = {field.name for field in dataclasses.fields(cls)}
        values = {key: value for key, value in data.items() if key in names}
        values["config"] = RunConfig.from_json(data["config"])
        values["machine"] = Machine.from_json(data["machine"])
        values["stack"] = Stack.from_json(data["stack"])
        for name in _TIMES:
            values[name] = tuple(data.get(name) or ())
        if data.get("throttled") is not None:
            values["throttled"] = tuple(data["throttled"])
        if data.get("joules") is not None:
            values.setdefault("energy_source", "counter")  # all there was before the field
        return cls(**values)


def append_record(path: Path, result: ProbeResult) -> None:
    """Write one result at the end of a record file, to the disk before this returns.

    Raises:
        OutputError: The place cannot be written.
    """
    append_lines(path, json.dumps({"format": FORMAT, **result.to_json()}) + "\n")


def append_lines(path: Path, text: str) -> None:
    """Write whole lines at the end of a record file, to the disk before this returns.

    Raises:
        OutputError: The place cannot be written.
    """
    try:
        _append(path, text)
    except OSError as error:
        raise _cannot_be_written(path, error) from None


def check_writable(path: Path) -> None:
    """Find out before the work whether its result can be written; the folder is made.

    Raises:
        OutputError: The place cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise _cannot_be_written(path, error) from None


def _cannot_be_written(path: Path, error: OSError) -> OutputError:
    return OutputError(f"`{path}` must be a place that can be written, but {error.strerror}.")


def _append(path: Path, line: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if _ends_torn(path):
            line = "\n" + line
        os.write(descriptor, line.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_records(path: Path) -> list[ProbeResult]:
    """Return all results of a record file; none if there is no file.

    A line torn by a kill in the middle of writing is dropped; any other damage is an error.

    Raises:
        DataError: A line is no record, or one of another format version.
    """
    return list(_lines(path)) if path.exists() else []


def _lines(path: Path) -> Iterator[ProbeResult]:
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"`{path}` must be a file of records, but {error}.") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines) or _looks_torn(line):
                continue
            raise DataError(
                f"`{path}` line {number} must be a JSON record, but it is damaged."
            ) from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else None
            raise DataError(
                f"`{path}` line {number} must be a record of format {FORMAT}, but it is of format "
                f"{found!r}; move the file away to start anew."
            )
        try:
            result = ProbeResult.from_json(data)
        except (KeyError, TypeError, AttributeError, ValueError, UsageError) as error:
            raise DataError(
                f"`{path}` line {number} must be a record, but it lacks a field or has one of "
                f"another kind: {error}"
            ) from None
        yield result


def _looks_torn(line: str) -> bool:
    return line.startswith('{"format"') and not line.rstrip().endswith("}")


def _ends_torn(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def same_place(result: ProbeResult, machine: Machine, stack: Stack) -> bool:
    """Whether a result may be used together with what is measured here and now."""
    return result.machine == machine and result.stack == stack


def difference(result: ProbeResult, machine: Machine, stack: Stack) -> str:
    """Say in what the place of a result differs from another, for people."""
    pairs = (
        (result.machine.to_json(), machine.to_json()),
        (result.stack.to_json(), stack.to_json()),
    )
    return "; ".join(
        f"{name} {there.get(name)} there, {value} here"
        for there, here in pairs
        for name, value in here.items()
        if there.get(name) != value
    )
