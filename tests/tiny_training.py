"""Trainings of the tiny model that take a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_advisor.advisor.training import TrainingResult, train
from lora_advisor.probes.architectures import resolve_architecture
from lora_advisor.probes.config import LoraShape, RunConfig


def config_of(model: Path, **changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "model": str(model),
        "trainer": "transformers",
        "method": "lora",
        "micro_batch": 2,
        "accumulation": 2,
        "seq_len": 96,
        "optimizer": "adamw_torch_fused",
        "precision": "fp32",
        "checkpointing": "off",
        "attention": "sdpa",
        "kernels": "none",
        "loss": "full",
        "lora": LoraShape(r=4, alpha=8, dropout=0.1, targets="all-linear"),
        "compile": "off",
        "allocator": "default",
    }
    return RunConfig(**{**values, **changes})


def run(config: RunConfig, data: Path, output: Path, **changes: Any) -> TrainingResult:
    arguments: dict[str, Any] = {
        "device": "cpu",
        "cap_bytes": None,
        "epochs": 1.0,
        "max_steps": 12,
        "learning_rate": 5e-3,
        "save_steps": 4,
    }
    architecture = resolve_architecture(config.model)
    return train(config, architecture, data, output, **{**arguments, **changes})


def weights(adapter: Path) -> dict[str, bytes]:
    from safetensors.torch import load_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
