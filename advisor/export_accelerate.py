"""Exports for `accelerate launch --config_file`: how a script is launched, not what it trains."""

from __future__ import annotations

from typing import Any

from lora_advisor.advisor.export_words import Recipe, Rule, Target, as_yaml
from lora_advisor.probes.config import RunConfig

#: Fields that its file carries of a configuration.
CARRIED = ("precision", "compile")


def _write(config: RunConfig, recipe: Recipe, asked: RunConfig) -> str:
    values: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU" if recipe.gpus > 1 else "NO",
        "num_machines": 1,
        "num_processes": recipe.gpus,
        "machine_rank": 0,
        "main_training_function": "main",
        "mixed_precision": "no" if config.precision == "fp32" else config.precision,
        "use_cpu": recipe.device != "cuda",
        "downcast_bf16": False,
        "debug": False,
    }
    if recipe.device == "cuda":
        values["gpu_ids"] = "all" if recipe.gpus > 1 else "0"
    if config.compile != "off":
        # What Trainer's `torch_compile=True` asks for; layers are accelerate's "regions".
        values["dynamo_config"] = {
            "dynamo_backend": "INDUCTOR",
            "dynamo_mode": "default",
            "dynamo_use_dynamic": False,
            "dynamo_use_fullgraph": False,
            "dynamo_use_regional_compilation": config.compile == "layers",
        }
    return as_yaml(values)


def _no_rules(recipe: Recipe) -> list[Rule]:
    return []


def _notes(config: RunConfig, recipe: Recipe) -> list[str]:
    return [
        "accelerate's file carries precision and compiling alone: model, batch, length, adapter, "
        "checkpointing, optimizer and the rest stand in the script (`export --to trl`), and are "
        "what the script says."
    ]


ACCELERATE = Target(
    name="accelerate",
    versions={"accelerate": "1.15"},
    suffix=".yaml",
    run="accelerate launch --config_file {file} SCRIPT.py",
    rules=_no_rules,
    write=_write,
    notes=_notes,
)
