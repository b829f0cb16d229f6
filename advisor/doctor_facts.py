"""`Facts`: what the doctor looks at on this machine, gathered without judging it."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from lora_advisor.advisor.asking import cache_dir
from lora_advisor.advisor.doctor_imports import Imports, try_imports
from lora_advisor.probes import nvml, unsloth

#: Variables that change what is measured or what can be loaded.
VARIABLES = (
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TORCHDYNAMO_DISABLE",
)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The first visible GPU as NVML knows it.

    Attributes:
        name: As the driver reports it.
        memory_bytes: All of its memory.
        used_bytes: Memory in use now, the driver's own included.
        driver: Version of the driver.
        capability: Compute capability such as "8.9".
        process_ids: Processes that hold a compute context.
    """

    name: str
    memory_bytes: int | None = None
    used_bytes: int | None = None
    driver: str | None = None
    capability: str | None = None
    process_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Place:
    """A folder that is written to."""

    path: str
    free_bytes: int
    is_writable: bool


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything the doctor judges.

    Attributes:
        python: Version of the interpreter.
        system: Operating system and machine.
        is_wsl: Whether this is Linux inside Windows.
        gpu: The first visible GPU; None when NVML shows none.
        versions: Installed version of each package by its distribution's name; None for missing.
        requirements: Version specifier of each package that this project needs.
        imports: From the child process.
        has_avx512_bf16: Whether the CPU has the instructions that bitsandbytes repacks weights for.
        environment: Those of VARIABLES that are set.
        here: The working folder, where plans, records and adapters are written.
        cache: The folder of downloaded models.
        own_cache: The folder of what is measured and traced.
        ram_bytes: All memory of the host.
        ram_free_bytes: Memory of the host that can be had now.
        unsloth: Unsloth with its versions, where it is installed.
        unsloth_folder: The folder that is to hold it; None where none is named.
    """

    python: str
    system: str
    is_wsl: bool
    gpu: Gpu | None
    versions: Mapping[str, str | None]
    requirements: Mapping[str, str]
    imports: Imports
    has_avx512_bf16: bool
    environment: Mapping[str, str]
    here: Place
    cache: Place
    own_cache: Place
    ram_bytes: int
    ram_free_bytes: int
    unsloth: str | None = None
    unsloth_folder: str | None = None


def gather() -> Facts:
    """Look at this machine; takes as long as importing torch and bitsandbytes does."""
    import psutil

    requirements = required_packages()
    names = (*requirements, "liger-kernel", "flash-attn", "pynvml")
    memory = psutil.virtual_memory()
    return Facts(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        is_wsl="microsoft" in platform.release().lower(),
        gpu=find_gpu(),
        versions={name: installed_version(name) for name in names},
        requirements=requirements,
        imports=try_imports(),
        has_avx512_bf16=_cpu_has("avx512_bf16"),
        environment={name: os.environ[name] for name in VARIABLES if name in os.environ},
        here=look_at(Path.cwd()),
        cache=look_at(cache_folder(os.environ)),
        own_cache=look_at(cache_dir()),
        ram_bytes=int(memory.total),
        ram_free_bytes=int(memory.available),
        unsloth=unsloth.engine(),
        unsloth_folder=os.environ.get(unsloth.FOLDER) or None,
    )


def find_gpu() -> Gpu | None:
    """Ask NVML about the first visible GPU."""
    name = nvml.device_name()
    if name is None:
        return None
    memory, processes = nvml.memory(), nvml.processes()
    return Gpu(
        name=name,
        memory_bytes=None if memory is None else memory.total_bytes,
        used_bytes=None if memory is None else memory.used_bytes,
        driver=nvml.driver(),
        capability=nvml.capability(),
        process_ids=None if processes is None else tuple(process.pid for process in processes),
    )


def required_packages() -> dict[str, str]:
    """Return what this project's own metadata asks for, extras left out: name to specifier."""
    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in metadata.requires("lora-advisor") or ()]
    return {
        each.name: str(each.specifier)
        for each in wanted
        if each.marker is None or each.marker.evaluate({"extra": ""})
    }


def installed_version(name: str) -> str | None:
    """Return a distribution's version without importing it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Return where huggingface_hub keeps models, by its own order of variables."""
    if "HF_HUB_CACHE" in environment:
        return Path(environment["HF_HUB_CACHE"]).expanduser()
    if "HF_HOME" in environment:
        return Path(environment["HF_HOME"]).expanduser() / "hub"
    base = environment.get("XDG_CACHE_HOME", "~/.cache")
    return Path(base).expanduser() / "huggingface" / "hub"


def look_at(folder: Path) -> Place:
    """Return the free space of a folder, or of the nearest one above it that exists."""
    found = folder
    while not found.exists() and found != found.parent:
        found = found.parent
    return Place(
        path=str(folder),
        free_bytes=shutil.disk_usage(found).free,
        is_writable=os.access(found, os.W_OK),
    )


def _cpu_has(flag: str) -> bool:
    try:
        return flag in Path("/proc/cpuinfo").read_text("utf-8", errors="replace").split()
    except OSError:
        return False
