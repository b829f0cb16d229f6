"""What a configuration is called, and which others it stands for."""

from __future__ import annotations

from typing import Any

from lora_advisor.probes.config import RunConfig


def short_form(config: RunConfig) -> RunConfig:
    """Return the configuration with at most two micro-batches a step.

    Its memory is that of any larger number: what is alive beside a micro-batch are the gradients,
    from the second on.
    """
    return config.replace(accumulation=min(2, config.accumulation))


def code_of(config: RunConfig) -> tuple[Any, ...]:
    """Return what decides which code runs, whatever it runs on and with how much."""
    return (
        config.stage, config.trainer, config.method, config.kernels, config.adapter,
        config.compile, config.checkpointing, config.embedding, config.cuda_graph,
        config.recompute,
    )  # fmt: skip


def arm_of(config: RunConfig) -> tuple[Any, ...]:
    """Return what decides how fast a configuration is beside its size."""
    return (
        config.method, config.kernels, config.adapter, config.compile, config.checkpointing,
        config.precision, config.embedding, config.cuda_graph, config.recompute,
    )  # fmt: skip


def describe(config: RunConfig) -> str:
    """Return a configuration in a few words."""
    parts = [
        config.method,
        config.precision,
        f"{config.micro_batch}{' pairs' if config.stage == 'dpo' else ''} x {config.seq_len} x "
        f"{config.accumulation}",
        {"off": "no checkpointing", "full": "checkpointing"}.get(
            config.checkpointing, f"checkpointing {config.checkpointing}"
        ),
    ]
    if config.kernels != "none":
        parts.append(config.kernels)
    if config.adapter != "peft":
        parts.append(f"{config.adapter} adapter")
    if config.compile != "off":
        parts.append(f"compiled {config.compile}")
    if config.cuda_graph != "off":
        parts.append("CUDA graph")
    if config.recompute == "needed":
        parts.append("short recomputation")
    if config.optimizer != "adamw_torch_fused":
        parts.append(config.optimizer)
    if config.allocator != "default":
        parts.append("expandable segments")
    if config.embedding != "device":
        parts.append("embeddings in host memory")
    if config.trainer != "trl":
        parts.append(config.trainer)
    if config.fp32_upcast:
        parts.append("fp32 upcast")
    return ", ".join(parts)
