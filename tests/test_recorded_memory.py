"""Runs of an H100 that nothing was tuned to: what their traces come to on its allocator."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_advisor.models.replayed import traced_memory
from lora_advisor.models.traced import TracedMemory
from lora_advisor.probes.architectures import from_hf_config
from lora_advisor.probes.extend import trace_all_layers
from lora_advisor.probes.record import ProbeResult, read_records

RECORDINGS = Path(__file__).parent / "recordings"

#: Rows by what they show, in cases that were drawn at random before they were measured.
DRAWN = {
    ("h100-drawn-20261124", 3): "Qwen3, LoRA, fp16, eager, Liger, expandable segments",
    ("h100-drawn-20261124", 13): "Qwen2.5, QLoRA, Liger, two micro-batches a step",
    ("h100-drawn-20261124", 31): "Gemma 2, sliding windows, offloaded checkpoints, paged AdamW",
    ("h100-drawn-20261124", 38): "Qwen3, packed rows, 8-bit AdamW",
    ("h100-drawn-20261125", 13): "Qwen2.5, full fine-tuning, SGD",
    ("h100-drawn-20261125", 16): "Llama 2, compiled layers",
    ("h100-drawn-20261125", 18): "Llama 3.2, full fine-tuning, fp32",
    ("h100-drawn-20261125", 22): "Gemma 3, eager, no checkpointing, 8-bit Lion",
}
#: Rows whose models were loaded without the block that from_pretrained reserves for all weights.
ARMS = {
    14: "Qwen3 MoE, no checkpointing",
    16: "GPT-NeoX",
    18: "full fine-tuning, 8-bit AdamW, Liger",
    26: "packed rows",
}


def _recorded(name: str, number: int) -> tuple[ProbeResult, TracedMemory]:
    """Return a row and what its trace comes to."""
    result = read_records(RECORDINGS / f"{name}.jsonl")[number]
    config = result.config
    trace = trace_all_layers(
        config,
        from_hf_config("recorded", dict(result.hf_config)),
        capability=result.machine.capability,
    )
    expandable = config.allocator == "expandable_segments"
    assert result.cap_bytes is None and result.outcome == "ok"
    return result, traced_memory(trace, expandable=expandable, cap_bytes=1 << 60)


@pytest.mark.parametrize(("name", "number"), DRAWN, ids=DRAWN.values())
def test_a_case_drawn_at_random_is_within_3_in_1000_and_its_reserve_within_3_per_cent(
    name: str, number: int
) -> None:
    result, traced = _recorded(name, number)

    assert traced.allocated_bytes == pytest.approx(result.allocated_bytes, rel=0.003)
    assert traced.reserved_bytes == pytest.approx(result.reserved_bytes, rel=0.03)


@pytest.mark.parametrize("number", ARMS, ids=ARMS.values())
def test_an_arm_of_the_step_is_within_7_in_1000(number: int) -> None:
    result, traced = _recorded("h100-arms-2026-11-24", number)

    assert traced.allocated_bytes == pytest.approx(result.allocated_bytes, rel=0.007)
