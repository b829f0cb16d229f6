"""Say what of this machine and its packages would spoil a plan or a training, and how to mend it.

`examine()` looks and judges; with `Facts` given it only judges, which is how it is tested. What is
not covered: whether a kernel computes the right thing, and any GPU but the first visible one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_advisor.advisor import doctor_stack as stack
from lora_advisor.advisor.doctor_facts import Facts, Place, gather
from lora_advisor.advisor.finding import Finding, gib, say
from lora_advisor.probes.machine import GIB

__all__ = ["Facts", "Finding", "examine", "gather", "to_json"]

#: Weights of the default model, Qwen2.5-1.5B, in bf16 (the bundled qwen2.5-1.5b.json):
#: less disk or RAM than this holds no download and no load.
WEIGHTS_BYTES = 2 * 1_543_714_304

#: Room for 4000 traces of up to 60 kB (`advisor/trace_cache.py`), and records.
OWN_CACHE_BYTES = GIB // 2

#: Oldest driver branch that runs a CUDA of this major version (CUDA Toolkit release notes, "Minimum
#: Required Driver Version for CUDA Minor Version Compatibility").
LEAST_DRIVER = {11: 450, 12: 525, 13: 580}

#: What each variable does to the results.
_VARIABLE_EFFECTS = {
    "CUDA_LAUNCH_BLOCKING": "every kernel is waited for, so that measured speeds are too low",
    "CUDA_VISIBLE_DEVICES": "only the first GPU it names is looked at",
    "HF_HUB_OFFLINE": "models that are not in the cache cannot be fetched",
    "PYTORCH_ALLOC_CONF": "it stands against the allocator that a plan asks for",
    "PYTORCH_CUDA_ALLOC_CONF": "it stands against the allocator that a plan asks for",
    "TORCHDYNAMO_DISABLE": "compiled configurations run uncompiled",
}


def examine(facts: Facts | None = None) -> tuple[Finding, ...]:
    """Return all findings.

    Args:
        facts: What to judge; None to look at this machine, which takes some seconds.
    """
    facts = gather() if facts is None else facts
    return (
        say("python", "ok", facts.python),
        _system(facts),
        _gpu(facts),
        _driver(facts),
        stack.judge_torch(facts),
        stack.judge_bitsandbytes(facts),
        *stack.judge_packages(facts),
        stack.judge_attention(facts),
        stack.judge_segments(facts),
        stack.judge_flash_attn(facts),
        stack.judge_liger(facts),
        stack.judge_unsloth(facts),
        _processes(facts),
        _environment(facts),
        _disk("disk", facts.here, "plans, checkpoints and adapters are written here"),
        _disk("model cache", facts.cache, "downloaded models are kept here", "HF_HOME"),
        _own_cache(facts.own_cache),
        _memory(facts),
    )


def to_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """Return the document that `lora-advisor doctor --json` prints."""
    return {
        "errors": sum(finding.status == "error" for finding in findings),
        "warnings": sum(finding.status == "warning" for finding in findings),
        "findings": [finding.to_json() for finding in findings],
    }


def _system(facts: Facts) -> Finding:
    if not facts.is_wsl:
        return say("system", "ok", facts.system)
    advice = (
        "Under WSL a full card spills to system memory, and a step takes many times longer instead "
        "of failing; nor are Windows' own programs listed: close them, and leave room with "
        "--reserve."
    )
    return say("system", "warning", f"{facts.system} (WSL)", advice)


def _gpu(facts: Facts) -> Finding:
    gpu, torch = facts.gpu, facts.imports.sections.get("torch", {})
    if gpu is not None:
        size = "" if gpu.memory_bytes is None else f", {gib(gpu.memory_bytes)}"
        return say("gpu", "ok", gpu.name + size)
    if not torch.get("is_available"):
        advice = (
            "Predictions only: without an NVIDIA GPU `plan`, `fit` and `predict` trace instead of "
            "measuring. Name the card to plan for with --gpu. Training runs on the CPU, which "
            "suits tiny models only."
        )
        return say("gpu", "unknown", "none", advice)
    if torch.get("hip"):
        advice = "AMD GPUs have not been tried: take no number for granted."
    else:
        advice = (
            "torch sees this GPU but NVML does not: the memory of processes, power and energy stay "
            "unknown. Install nvidia-ml-py and the driver's NVML library."
        )
    return say("gpu", "warning", str(torch.get("device", "one that only torch sees")), advice)


def _driver(facts: Facts) -> Finding:
    gpu, torch = facts.gpu, facts.imports.sections.get("torch", {})
    if gpu is None:
        return say("driver", "unknown", "none")
    value = gpu.driver or "version unknown"
    takes, wants = torch.get("driver_cuda"), torch.get("cuda")
    if not takes or not wants:
        return say("driver", "ok", value)
    value = f"{value}, up to CUDA {takes}"
    newest, needed = (int(str(version).split(".")[0]) for version in (takes, wants))
    if newest >= needed:
        return say("driver", "ok", value)
    branch = f" to {LEAST_DRIVER[needed]} or newer" if needed in LEAST_DRIVER else ""
    advice = (
        f"The installed torch is built for CUDA {wants}, which this driver cannot run: update the "
        f"driver{branch}, or install a torch built for CUDA {newest}."
    )
    return say("driver", "error", value, advice)


def _processes(facts: Facts) -> Finding:
    gpu = facts.gpu
    if gpu is None:
        return say("gpu processes", "unknown", "no GPU")
    used = "" if gpu.used_bytes is None else f", {gib(gpu.used_bytes)} in use"
    if gpu.process_ids is None:
        return say("gpu processes", "unknown", f"not listed{used}")
    if gpu.process_ids:
        pids = ", ".join(str(pid) for pid in gpu.process_ids)
        advice = "They take memory and time from what is measured: end them before a plan."
        value = f"{len(gpu.process_ids)} (process {pids}){used}"
        return say("gpu processes", "warning", value, advice)
    if gpu.used_bytes is not None and gpu.used_bytes > GIB:
        # The driver lists no graphics programs, and in a container none at all.
        advice = (
            "Something unlisted holds that memory (a desktop, a program outside this container): a "
            "plan can use only the rest."
        )
        return say("gpu processes", "warning", f"none listed{used}", advice)
    return say("gpu processes", "ok", f"none{used}")


def _environment(facts: Facts) -> Finding:
    if not facts.environment:
        return say("environment", "ok", "nothing that changes results")
    value = ", ".join(f"{name}={text}" for name, text in facts.environment.items())
    effects = [f"{name}: {_VARIABLE_EFFECTS[name]}" for name in facts.environment]
    return say("environment", "warning", value, f"{'; '.join(effects)}.")


def _disk(name: str, place: Place, purpose: str, variable: str | None = None) -> Finding:
    elsewhere = "work in another folder" if variable is None else f"name another with {variable}"
    if not place.is_writable:
        advice = f"It cannot be written to, and {purpose}: {elsewhere}."
        return say(name, "error", place.path, advice)
    value = f"{place.path}, {gib(place.free_bytes)} free"
    if place.free_bytes >= WEIGHTS_BYTES:
        return say(name, "ok", value)
    advice = (
        f"Less than the weights of Qwen2.5-1.5B take, {gib(WEIGHTS_BYTES)}, and {purpose}: make "
        f"room, or {elsewhere}."
    )
    return say(name, "warning", value, advice)


def _own_cache(place: Place) -> Finding:
    purpose = "probes and traces are kept here"
    elsewhere = "name another with LORA_ADVISOR_CACHE"
    if not place.is_writable:
        advice = f"It cannot be written to, and {purpose}: {elsewhere}."
        return say("own cache", "error", place.path, advice)
    value = f"{place.path}, {gib(place.free_bytes)} free"
    if place.free_bytes >= OWN_CACHE_BYTES:
        return say("own cache", "ok", value)
    return say("own cache", "warning", value, f"Little room, and {purpose}: make room, or "
               f"{elsewhere}.")  # fmt: skip


def _memory(facts: Facts) -> Finding:
    value = f"{gib(facts.ram_bytes)}, {gib(facts.ram_free_bytes)} available"
    if facts.ram_free_bytes >= WEIGHTS_BYTES:
        return say("memory", "ok", value)
    advice = f"Weights pass through host memory; Qwen2.5-1.5B's take {gib(WEIGHTS_BYTES)}."
    return say("memory", "warning", value, advice)
