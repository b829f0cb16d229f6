"""Ask the NVIDIA driver (NVML) about the first visible GPU; every answer may be None, "unknown".

No CUDA context is made and torch is not imported. The GPU is the first of CUDA_VISIBLE_DEVICES.
NVML numbers the cards by PCI bus; CUDA does so only with CUDA_DEVICE_ORDER=PCI_BUS_ID, which the
runner sets for its children.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")

#: The power limit lowers the clock. A card at full load often works there, a laptop's always: that
#: is the card's speed.
POWER_CAP = "power cap"
#: Names of the reasons for a lower clock, as NVML calls them (nvml.h, nvmlClocksEventReasons). Idle
#: and settings of the user are not among them. All but the power cap make a time unfit to compare.
_THROTTLES = {
    "SwPowerCap": POWER_CAP,
    "HwSlowdown": "hardware slowdown",
    "SwThermalSlowdown": "temperature",
    "HwThermalSlowdown": "temperature, by the hardware",
    "HwPowerBrakeSlowdown": "power brake",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuMemory:
    """Memory of the whole device, what the driver keeps for itself counted as used."""

    total_bytes: int
    used_bytes: int
    free_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuProcess:
    """A process that holds a compute context; its bytes are None where the driver hides them."""

    pid: int
    used_bytes: int | None


def forget() -> None:
    """Ask the driver anew: for a process that was forked from one that had asked."""
    _library.cache_clear()


def device_count() -> int:
    """Return the number of GPUs that the driver sees and CUDA_VISIBLE_DEVICES does not hide."""
    nvml = _library()
    return 0 if nvml is None or _device(nvml) is None else int(nvml.nvmlDeviceGetCount())


def see_first_only() -> None:
    """Let this process see the first visible GPU alone, before it makes a CUDA context.

    Of several, transformers' Trainer would take all (`nn.DataParallel`), which TRL refuses.
    """
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as NVML counts
    os.environ["CUDA_VISIBLE_DEVICES"] = _first_visible()


def device_name() -> str | None:
    """Return the name as the driver reports it."""
    return _ask(lambda nvml, gpu: str(nvml.nvmlDeviceGetName(gpu)))


def driver() -> str | None:
    """Return the version of the driver."""
    return _ask(lambda nvml, gpu: str(nvml.nvmlSystemGetDriverVersion()))


def cuda_version() -> str | None:
    """Return the newest CUDA that the driver runs, such as "13.0"."""
    number = _ask(lambda nvml, gpu: int(nvml.nvmlSystemGetCudaDriverVersion_v2()))
    return None if not number else f"{number // 1000}.{number % 1000 // 10}"


def capability() -> str | None:
    """Return the CUDA compute capability, such as "8.9"."""
    return _ask(
        lambda nvml, gpu: ".".join(str(n) for n in nvml.nvmlDeviceGetCudaComputeCapability(gpu))
    )


def memory() -> GpuMemory | None:
    """Return how much memory the device has, and how much of it is in use now."""
    found = _ask(lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu))
    if found is None:
        return None
    return GpuMemory(
        total_bytes=int(found.total), used_bytes=int(found.used), free_bytes=int(found.free)
    )


def processes() -> tuple[GpuProcess, ...] | None:
    """Return the processes that hold a compute context on the device.

    Inside a container the driver may list none, or number them as the host does.
    """
    found = _ask(lambda nvml, gpu: list(nvml.nvmlDeviceGetComputeRunningProcesses(gpu)))
    if found is None:
        return None
    return tuple(
        GpuProcess(
            pid=int(process.pid),
            used_bytes=None if process.usedGpuMemory is None else int(process.usedGpuMemory),
        )
        for process in found
    )


def process_bytes(pid: int) -> int | None:
    """Return what a process holds on the device; None where the driver does not list it."""
    sizes = [process.used_bytes for process in processes() or () if process.pid == pid]
    known = [size for size in sizes if size is not None]
    return sum(known) if known and len(known) == len(sizes) else None


def other_processes(pid: int) -> tuple[GpuProcess, ...] | None:
    """Return the processes on the device that are not `pid`."""
    found = processes()
    return None if found is None else tuple(process for process in found if process.pid != pid)


def energy_joules() -> float | None:
    """Return the board's energy since the driver was loaded; only differences mean anything.

    Cards since Volta count, GeForce cards among them; older ones, many virtual GPUs and Jetsons do
    not.
    """
    # NVML counts millijoules (nvml.h, nvmlDeviceGetTotalEnergyConsumption).
    return _ask(lambda nvml, gpu: float(nvml.nvmlDeviceGetTotalEnergyConsumption(gpu)) / 1000)


def power_w() -> float | None:
    """Return the board's power; since Ampere, but for the A100, the mean of the last second."""
    # NVML gives milliwatts (nvml.h, nvmlDeviceGetPowerUsage).
    return _ask(lambda nvml, gpu: float(nvml.nvmlDeviceGetPowerUsage(gpu)) / 1000)


def instant_power_w() -> float | None:
    """Return the board's power now, where the driver tells it apart from the mean."""

    def question(nvml: ModuleType, gpu: Any) -> float | None:
        (field,) = nvml.nvmlDeviceGetFieldValues(gpu, [nvml.NVML_FI_DEV_POWER_INSTANT])
        known = field.nvmlReturn == nvml.NVML_SUCCESS
        return float(field.value.uiVal) / 1000 if known else None

    return _ask(question)


def power_limit_w() -> float | None:
    """Return the power that the board is held to now, the lowest of all limits."""
    return _ask(lambda nvml, gpu: float(nvml.nvmlDeviceGetEnforcedPowerLimit(gpu)) / 1000)


def sm_clock_mhz() -> int | None:
    """Return the clock of the multiprocessors now."""
    return _ask(lambda nvml, gpu: int(nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM)))


def sm_clock_max_mhz() -> int | None:
    """Return the highest clock of the multiprocessors that the card allows."""
    return _ask(lambda nvml, gpu: int(nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_SM)))


def temperature_c() -> int | None:
    """Return the temperature of the chip."""
    return _ask(
        lambda nvml, gpu: int(nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU))
    )


def throttle_reasons() -> tuple[str, ...] | None:
    """Return why the clock is lower than it could be; empty when it is not held down."""
    bits = _ask(lambda nvml, gpu: int(nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu)))
    nvml = _library()
    if bits is None or nvml is None:
        return None
    prefix = "nvmlClocksEventReason"
    return tuple(
        word for name, word in _THROTTLES.items() if bits & getattr(nvml, prefix + name, 0)
    )


def _ask(question: Callable[[ModuleType, Any], T]) -> T | None:
    """Return the answer about the first visible GPU, or None if the driver has none."""
    nvml = _library()
    gpu = None if nvml is None else _device(nvml)
    if nvml is None or gpu is None:
        return None
    try:
        return question(nvml, gpu)
    except (nvml.NVMLError, AttributeError):  # an older binding lacks the function
        return None


@cache
def _library() -> ModuleType | None:
    """Return pynvml with the driver's library loaded, once per process."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml  # type: ignore[no-any-return]


def _first_visible() -> str:
    """Return what CUDA_VISIBLE_DEVICES calls the first GPU; "" or "-1" where it hides all."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "0" if visible is None else visible.split(",")[0].strip()


def _device(nvml: ModuleType) -> Any:
    """Return the handle of the first visible GPU, or None."""
    first = _first_visible()
    try:
        if first.isdigit():
            return nvml.nvmlDeviceGetHandleByIndex(int(first))
        if first.startswith("MIG-"):
            return nvml.nvmlDeviceGetHandleByUUID(first)
        if first.startswith("GPU-"):  # CUDA accepts the first characters of a UUID
            handles = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
            return next((h for h in handles if nvml.nvmlDeviceGetUUID(h).startswith(first)), None)
    except nvml.NVMLError:
        return None
    return None  # "" and "-1" hide every GPU
