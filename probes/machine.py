"""`Machine` and `Stack`: where and with what a number was measured.

Results of two machines or two stacks never mix: records, models and plans carry both, and what does
not match is left out or refused.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Self

from lora_advisor.probes import nvml
from lora_advisor.probes.errors import UnavailableError, UsageError

#: Bytes in a GiB.
GIB = 2**30

#: Packages whose version changes memory or speed; the record's key is the second name.
_PACKAGES = {
    "torch": "torch",
    "transformers": "transformers",
    "peft": "peft",
    "accelerate": "accelerate",
    "bitsandbytes": "bitsandbytes",
    "trl": "trl",
    "liger-kernel": "liger_kernel",
}

#: Revision of this program's training step: raised when the same configuration takes another time
#: or other memory than before, so that nobody learns from runs of the step that was; runs of other
#: engines and of peft's own layers go with them.
STEP = 2


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The versions a number was measured with; None where a package is not installed.

    Attributes:
        loss_path: How the SFT loss of the installed trl is computed: "fused" (TRL 1.15 and later),
            "full", or None without trl.
        step: Revision of the training step (`STEP`); None before they were numbered.
    """

    torch: str
    transformers: str
    peft: str
    accelerate: str | None = None
    bitsandbytes: str | None = None
    trl: str | None = None
    liger_kernel: str | None = None
    loss_path: str | None = None
    step: int | None = None

    def packages(self) -> dict[str, Any]:
        """Return the versions without the step's revision, for tables of packages."""
        return {name: version for name, version in self.to_json().items() if name != "step"}

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read the JSON form; fields of newer versions are dropped."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in data.items() if key in names})


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The device a number was measured on, or would be.

    Attributes:
        kind: "cuda", "cpu", or "card" for a card of the table that is not here.
        name: As the driver reports it; for a CPU its model and the number of threads used.
        memory_bytes: All memory of the device.
        driver: Version of the NVIDIA driver; None without.
        capability: CUDA compute capability such as "8.9"; None without.
        host: Model of the CPU, which sets the floor of a step's time.
    """

    kind: str
    name: str
    memory_bytes: int
    driver: str | None = None
    capability: str | None = None
    host: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read the JSON form; fields of newer versions are dropped."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in data.items() if key in names})


@functools.cache  # asked for each trace
def detect_stack() -> Stack:
    """Return the installed versions, without importing the packages."""
    versions: dict[str, Any] = {}
    for package, key in _PACKAGES.items():
        try:
            versions[key] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[key] = None
    return Stack(**versions, loss_path=_loss_path(versions["trl"]), step=STEP)


def _loss_path(trl: str | None) -> str | None:
    """TRL computes the SFT loss in tiles by default since 1.7, always since 1.15."""
    if trl is None:
        return None
    major, minor = (int(part) for part in trl.split(".")[:2])
    return "fused" if (major, minor) >= (1, 7) else "full"


def gpu_present() -> bool:
    """Whether the driver shows a GPU; torch is not imported."""
    return nvml.device_count() > 0


def detect_machine(device: str) -> Machine:
    """Return what "cuda" or "cpu" is here.

    Raises:
        UnavailableError: There is no GPU.
        UsageError: No such device.
    """
    if device == "cpu":
        return cpu_machine()
    if device != "cuda":
        raise UsageError(f'`device` must be "cuda" or "cpu" to be measured on, but got {device!r}.')
    name, memory = nvml.device_name(), nvml.memory()
    if name is None or memory is None:
        raise UnavailableError(
            "`device` cuda needs an NVIDIA GPU, but the driver shows none; use the CPU, or plan "
            "for a card that is not here by its name."
        )
    return Machine(
        kind="cuda",
        name=name,
        memory_bytes=memory.total_bytes,
        driver=nvml.driver(),
        capability=nvml.capability(),
        host=_cpu_model(),
    )


def cpu_machine() -> Machine:
    """Return this machine's CPU as a device."""
    import psutil

    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    return Machine(
        kind="cpu",
        name=f"{_cpu_model()}, {threads} threads",
        memory_bytes=int(psutil.virtual_memory().total),
        host=_cpu_model(),
    )


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123 - a device file
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
