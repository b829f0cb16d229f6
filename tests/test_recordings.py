"""Probe records of a real card: they read, the trace meets them, the plan's speed is in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_advisor.models.memory import context_of
from lora_advisor.models.replayed import traced_memory
from lora_advisor.probes.architectures import from_hf_config
from lora_advisor.probes.extend import trace_all_layers
from lora_advisor.probes.record import ProbeResult, read_records

ROOT = Path(__file__).parent.parent
RECORDS = read_records(ROOT / "tests/recordings/h100-qwen2.5-1.5b-2026-11-23.jsonl")
EAGER = {
    (r.config.trainer, r.config.kernels, r.config.micro_batch): r
    for r in RECORDS
    if r.outcome == "ok" and r.config.compile == "off"
}


def test_every_ending_is_in_the_records() -> None:
    assert {"ok", "out_of_memory", "interrupted"} == {result.outcome for result in RECORDS}


@pytest.mark.parametrize("result", EAGER.values(), ids=["-".join(map(str, key)) for key in EAGER])
def test_the_trace_of_a_recorded_probe_is_within_half_a_per_cent(result: ProbeResult) -> None:
    trace = trace_all_layers(
        result.config,
        from_hf_config("recorded", dict(result.hf_config)),
        capability=result.machine.capability,
    )
    traced = traced_memory(trace, expandable=False)

    assert result.allocated_bytes is not None and result.reserved_bytes is not None
    assert traced.allocated_bytes == pytest.approx(result.allocated_bytes, rel=0.005)
    assert traced.reserved_bytes == pytest.approx(result.reserved_bytes, rel=0.02)


def test_no_capped_run_held_more_than_its_cap() -> None:
    held = [
        (result.reserved_bytes, result.cap_bytes)
        for result in RECORDS
        if result.reserved_bytes is not None and result.cap_bytes is not None
    ]

    assert held
    assert all(reserved <= cap for reserved, cap in held)


def test_the_published_speed_is_that_of_the_fastest_record() -> None:
    file = ROOT / "benchmarks/results/plan_on_card_h100_2026-11-23.json"
    published = json.loads(file.read_text())

    fastest = max(r.tokens_per_s for r in RECORDS if r.tokens_per_s is not None)
    assert published["tokens_per_s"] == pytest.approx(fastest)


def test_the_context_of_an_h100_is_the_largest_recorded_one() -> None:
    measured = {result.context_bytes for result in RECORDS if result.context_bytes is not None}

    assert max(measured) == context_of("9.0").upper_bytes
