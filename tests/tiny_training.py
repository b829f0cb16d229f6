"""Trainings of the tiny model that take a second."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from lora_advisor.advisor.training import TrainingResult, train
from lora_advisor.probes.architectures import resolve_architecture
from lora_advisor.probes.config import LoraShape, RunConfig

#: What libraries warn of in trainings on a card and on older versions, where warnings are errors.
WARNINGS = [
    # peft 0.21 asks transformers 5.23 by names that transformers calls deprecated.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    # torch 2.11 uses what it calls deprecated when its compiler is imported.
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
]


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


def one_pass_config(model: Path | str, **changes: Any) -> RunConfig:
    """Return a configuration of TRL's trainer with all that this project puts in its place."""
    values = {
        "trainer": "trl",
        "loss": "one_pass",
        "adapter": "fused",
        "lora": LoraShape(r=4, alpha=8, dropout=0.0, targets="all-linear"),
        "checkpointing": "full",
        "seq_len": 64,
        **changes,
    }
    return config_of(Path(model), **values)


def masked_rows(
    count: int, *, lengths: tuple[int, int] = (20, 64), prompt: int = 40
) -> list[dict[str, list[int]]]:
    """Return rows of several lengths; their prompts, of so many tokens at most, have no labels."""
    draw = random.Random(7)
    rows = []
    for _ in range(count):
        length, before = draw.randint(*lengths), draw.randint(1, prompt)
        ids = [draw.randint(3, 258) for _ in range(length)]
        labels = [-100 if at < before else token for at, token in enumerate(ids)]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


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
