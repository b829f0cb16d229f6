"""What a device can say about itself while a step runs: marks in time, memory, energy.

`CudaMeter` asks PyTorch's allocator and NVML, `CpuMeter` the kernel; what a device cannot say is
None. Made in the process that runs the step, before it touches the device.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lora_advisor.probes import nvml
from lora_advisor.probes.cards import card_of
from lora_advisor.probes.energy import Gauge, open_gauge
from lora_advisor.probes.errors import UnavailableError
from lora_advisor.probes.machine import Machine


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Peaks of this process so far, as in `ProbeResult`."""

    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    process_bytes: int | None = None
    context_bytes: int | None = None
    alloc_retries: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """State of the device at one moment, where it tells.

    Attributes:
        sm_clock_mhz: Clock of the multiprocessors.
        temperature_c: Temperature of the chip.
        throttled: Why the clock is held down; empty when it is not.
    """

    sm_clock_mhz: int | None = None
    temperature_c: int | None = None
    throttled: tuple[str, ...] | None = None


class Meter(Protocol):
    """What the stopwatch and the worker ask of a device."""

    def synchronize(self) -> None:
        """Wait until the device has done all it was given."""

    def mark(self) -> Any:
        """Return a point in the device's time, or None."""

    def between_s(self, start: Any, end: Any) -> float | None:
        """Return the seconds between two marks; the device must have passed both."""

    def open_gauge(self) -> Gauge | None:
        """Return what tells the energy from now on, or None."""

    def condition(self) -> Condition | None:
        """Return the state of the device now, or None."""

    def sm_clock_max_mhz(self) -> int | None:
        """Return the highest clock that the device allows, or None."""

    def live_bytes(self) -> int | None:
        """Return the bytes of live tensors."""

    def memory(self) -> Memory:
        """Return the peaks so far."""


class CpuMeter:
    """A CPU: it has no queue, no allocator to ask and no energy counter."""

    def synchronize(self) -> None:
        """Do nothing: operations on a CPU have ended when they return."""

    def mark(self) -> None:
        """Return None: host time is all there is."""

    def between_s(self, start: None, end: None) -> None:
        """Return None."""

    def open_gauge(self) -> None:
        """Return None."""

    def condition(self) -> None:
        """Return None."""

    def sm_clock_max_mhz(self) -> None:
        """Return None."""

    def live_bytes(self) -> None:
        """Return None."""

    def memory(self) -> Memory:
        """Return the peak resident size."""
        return Memory(process_bytes=peak_resident_bytes())


class CudaMeter:
    """The first visible GPU, its allocator held to a cap."""

    def __init__(self, cap_bytes: int | None) -> None:
        """Create the CUDA context and set the cap.

        Raises:
            UnavailableError: There is no GPU that PyTorch can use.
        """
        self._used_before = _used_bytes()
        self._joules_before = nvml.energy_joules()
        import torch

        if not torch.cuda.is_available():
            raise UnavailableError(
                "A probe on cuda needs an NVIDIA GPU and a CUDA build of PyTorch, but "
                f"torch {torch.__version__} finds no GPU."
            )
        torch.cuda.init()  # type: ignore[no-untyped-call]
        if cap_bytes is not None:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, cap_bytes / total))
        self._cuda = torch.cuda

    def synchronize(self) -> None:
        """Wait for all streams."""
        self._cuda.synchronize()

    def mark(self) -> Any:
        """Return a recorded CUDA event."""
        event = self._cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def between_s(self, start: Any, end: Any) -> float:
        """Return the seconds between two recorded events."""
        return float(start.elapsed_time(end)) / 1000

    def open_gauge(self) -> Gauge | None:
        """Return the best gauge that the board has."""
        board = self._cuda.get_device_properties(0)
        card = card_of(Machine(kind="cuda", name=board.name, memory_bytes=board.total_memory))
        return open_gauge(self._joules_before, None if card is None else card.tdp_w)

    def condition(self) -> Condition:
        """Return clock, temperature and throttling: three questions to the driver."""
        return Condition(
            throttled=nvml.throttle_reasons(),
            sm_clock_mhz=nvml.sm_clock_mhz(),
            temperature_c=nvml.temperature_c(),
        )

    def sm_clock_max_mhz(self) -> int | None:
        """Return the highest clock that the card allows."""
        return nvml.sm_clock_max_mhz()

    def live_bytes(self) -> int:
        """Return the bytes of live tensors."""
        return int(self._cuda.memory_allocated())

    def memory(self) -> Memory:
        """Return the peaks of the allocator, and of the process where NVML shows it."""
        reserved = int(self._cuda.max_memory_reserved())
        context = self.context_bytes()
        return Memory(
            allocated_bytes=int(self._cuda.max_memory_allocated()),
            reserved_bytes=reserved,
            # NVML knows only the present. What is not the allocator's does not shrink, so the
            # peak of the process is that plus the allocator's peak.
            process_bytes=None if context is None else context + reserved,
            context_bytes=context,
            alloc_retries=int(self._cuda.memory_stats().get("num_alloc_retries", 0)),
        )

    def context_bytes(self) -> int | None:
        """Return what this process holds on the device now, beside the allocator's memory."""
        held = nvml.process_bytes(os.getpid())
        if held is None:
            held = self._device_growth()
        return None if held is None else max(0, held - int(self._cuda.memory_reserved()))

    def _device_growth(self) -> int | None:
        """Return by how much the device filled since the start, if only this process can be why.

        In a container the driver hides processes or gives them the host's numbers.
        """
        seen, used = nvml.processes(), _used_bytes()
        if seen is None or len(seen) > 1 or used is None or self._used_before is None:
            return None
        return used - self._used_before


def open_meter(device: str, cap_bytes: int | None) -> Meter:
    """Return the meter of "cuda" or "cpu", the device ready for use."""
    return CudaMeter(cap_bytes) if device == "cuda" else CpuMeter()


def peak_resident_bytes() -> int:
    """Return the peak resident size of this process.

    `ru_maxrss` would be the parent's peak where that is larger: exec keeps it (Linux, fs/exec.c,
    `setmax_mm_hiwater_rss`). VmHWM starts anew.
    """
    try:
        for line in Path("/proc/self/status").read_text("ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _used_bytes() -> int | None:
    memory = nvml.memory()
    return None if memory is None else memory.used_bytes


#: What PyTorch's dispatcher calls the attention kernels (aten/native_functions.yaml).
_ATTENTION_OPERATIONS = {
    "_scaled_dot_product_flash_attention": "flash",
    "_scaled_dot_product_cudnn_attention": "cudnn",
    "_scaled_dot_product_efficient_attention": "efficient",
    "_scaled_dot_product_attention_math": "math",
    "flash_attn": "flash",
    "FlashAttn": "flash",
}


def watch_attention() -> Callable[[], str | None]:
    """Start to watch which attention kernels run; the function returned stops and names them.

    Operations are watched on the host: watching kernels on the device would load CUPTI, which takes
    device memory for the rest of the process. Any failure is "unknown", never an error.
    """
    from torch.profiler import ProfilerActivity, profile

    try:
        profiler: Any = profile(activities=[ProfilerActivity.CPU])
        profiler.start()
    except Exception:
        return lambda: None

    def stop() -> str | None:
        try:
            profiler.stop()
            # Names only: to build the whole tree of events takes seconds.
            return attention_of(
                {event.name() for event in profiler.profiler.kineto_results.events()}
            )
        except Exception:
            return None

    return stop


def attention_of(operations: set[str]) -> str | None:
    """Return the attention kernel among the names of a step's operations, or None.

    Several are joined by "+"; a softmax without any of them is the eager form.
    """
    found = {
        kernel
        for part, kernel in _ATTENTION_OPERATIONS.items()
        if any(part in name for name in operations)
    }
    if found:
        return "+".join(sorted(found))
    return "eager" if any("_softmax" in name and "log" not in name for name in operations) else None
