"""Unsloth as an engine beside our own step: where it is, what it takes, what stands for it.

It is never required. Its packages ask for older transformers, TRL and datasets than this project,
so they lie in a folder of their own (requirements-unsloth.txt), which LORA_ADVISOR_UNSLOTH names,
and come first in the processes that run it. What is not covered: preference pairs, packed rows,
several cards, and models that Unsloth runs as transformers wrote them. Read in unsloth 2026.10.9.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import UnavailableError

NAME = "unsloth"
#: The variable that names the folder.
FOLDER = "LORA_ADVISOR_UNSLOTH"
#: Set in the processes whose packages are Unsloth's.
_ENGINE = "LORA_ADVISOR_ENGINE"
#: Model types that it has code of its own for (models/loader.py, FastLanguageModel).
MODEL_TYPES = ("llama", "mistral", "gemma", "gemma2", "qwen2", "qwen3")
#: What "all-linear" means in them; Unsloth's own default too.
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: RunConfig's checkpointing in its words.
CHECKPOINTING: dict[str, Any] = {"off": False, "full": True, "unsloth": "unsloth"}
#: How it runs where nothing else is asked for; of the other knobs it has no choice.
AS_IT_IS: Mapping[str, Any] = {
    "stage": "sft", "trainer": NAME, "checkpointing": "unsloth", "attention": "sdpa",
    "kernels": "none", "loss": "fused", "adapter": "peft", "compile": "off",
    "allocator": "expandable_segments", "embedding": "device", "packing": False,
    "recompute": "layer", "cuda_graph": "off",
    "fp32_upcast": False,
}  # fmt: skip
_HOW = f"`{FOLDER}` must name the folder of its packages, see requirements-unsloth.txt"


def engine() -> str | None:
    """Return Unsloth with the versions that it runs with; None where it is not installed."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return None
    names = (NAME, "unsloth_zoo", "transformers", "trl", "peft")
    found = {name: _version(name, Path(folder)) for name in names}
    if found[NAME] is None:
        return None
    return ", ".join(f"{name} {version}" for name, version in found.items() if version)


def _version(name: str, folder: Path) -> str | None:
    """Return the version of a package in a folder of packages, or else of the one that is used."""
    there = next(iter(metadata.distributions(name=name, path=[str(folder)])), None)
    if there is not None:
        return there.version
    try:
        return None if name == NAME else metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def why_not(model_type: str | None, *, device: str, stage: str, gpus: int) -> str | None:
    """Return why Unsloth is left out of a plan; None where it is not.

    Args:
        model_type: What transformers calls the architecture.
        device: What is planned for: a machine's kind.
        stage: Of the training.
        gpus: Cards that train together.
    """
    if device != "cuda":
        return "its kernels run on a GPU that is here; nothing of it can be traced"
    if engine() is None:
        folder = os.environ.get(FOLDER)
        return f"it is not installed: {_HOW}" if not folder else f"`{folder}` lacks it: {_HOW}"
    if model_type not in MODEL_TYPES:
        return f"it has no code of its own for model type {model_type!r}"
    if stage != "sft":
        return "with it rows are trained on here, no preference pairs"
    return "with it one card trains here" if gpus > 1 else None


def require() -> None:
    """Refuse to run it where its packages are not those of this process.

    Raises:
        UnavailableError: Naming what is missing.
    """
    if os.environ.get(_ENGINE) != NAME:
        reason = f"but {_HOW}" if engine() is None else "but this one began without it"
        raise UnavailableError(f"`trainer` {NAME!r} needs a process with its packages, {reason}.")


def is_here() -> bool:
    """Whether the packages of this process are Unsloth's."""
    return os.environ.get(_ENGINE) == NAME


def environment() -> dict[str, str]:
    """Return the variables of a process that runs it.

    Raises:
        UnavailableError: It is not installed.
    """
    if engine() is None:
        raise UnavailableError(f"`trainer` {NAME!r} needs Unsloth, but {_HOW}.")
    # Its generated code lies beside Inductor's; by default it would be where the user stands.
    user = os.getuid() if hasattr(os, "getuid") else 0  # Windows has none, and calls all files 0's
    compiled = Path(tempfile.gettempdir()) / f"lora-advisor-unsloth-{user}"
    compiled.mkdir(mode=0o700, exist_ok=True)
    if compiled.stat().st_uid != user:  # code is run from there
        compiled = Path(tempfile.mkdtemp(prefix="lora-advisor-unsloth-"))
    paths = [os.environ[FOLDER], *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        _ENGINE: NAME,
        "UNSLOTH_DISABLE_STATISTICS": "1",  # else it asks the hub
        "UNSLOTH_COMPILE_LOCATION": str(compiled),
    }


def stand_in(config: RunConfig) -> RunConfig:
    """Return the configuration of ours that is traced for one of Unsloth's; others as they are.

    Its step holds what TRL's does with a fused adapter and checkpoints in host memory, and one to
    five per cent more (benchmarks/results/unsloth_memory.json).
    """
    if config.trainer != NAME:
        return config
    assert config.lora is not None
    offload = config.checkpointing == "unsloth"
    return config.replace(
        trainer="trl",
        loss="fused",
        adapter="peft" if config.lora.dropout else "fused",
        checkpointing="offload" if offload else config.checkpointing,
        quant_type=config.quant_type,
        double_quant=config.double_quant,
    )
