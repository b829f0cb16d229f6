"""Runs of an H100 that were recorded before this project was written, and a tiny architecture."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from lora_advisor.probes.architectures import Architecture, from_hf_config
from lora_advisor.probes.config import LoraShape, RunConfig
from lora_advisor.probes.events import Trace
from lora_advisor.probes.extend import trace_all_layers

H100_RUNS = Path(__file__).resolve().parents[2] / "shared" / "data" / "h100_runs.jsonl"

TINY: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


@cache
def _lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in H100_RUNS.read_text("utf-8").splitlines()]


def h100_runs() -> list[dict[str, Any]]:
    """Return all recorded runs; the test is skipped where the file is not."""
    if not H100_RUNS.exists():
        pytest.skip(f"{H100_RUNS} is not here")
    return _lines()


def run_of(row: dict[str, Any]) -> tuple[RunConfig, Architecture]:
    """Return what a recorded row ran."""
    return RunConfig.from_json(row["config"]), from_hf_config("recorded", row["hf_config"])


@cache
def trace_of(number: int) -> Trace:
    """Return the trace of a recorded row, made once in a test run."""
    return trace_all_layers(*run_of(_lines()[number]), capability="9.0")


def tiny(**changes: Any) -> Architecture:
    """Return the figures of a tiny model, some of them changed."""
    return from_hf_config("tiny", {**TINY, **changes})


def configure(**changes: Any) -> RunConfig:
    """Return a configuration of the tiny model, some fields changed."""
    values: dict[str, Any] = {
        "model": "tiny",
        "method": "lora",
        "micro_batch": 2,
        "seq_len": 64,
        "optimizer": "adamw_torch_fused",
        "precision": "bf16",
        "checkpointing": "full",
        "attention": "sdpa",
        "kernels": "none",
        "loss": "fused",
        "lora": LoraShape(r=8, alpha=16, dropout=0.0, targets="all-linear"),
        "compile": "off",
        "allocator": "default",
        **changes,
    }
    return RunConfig(**values)
