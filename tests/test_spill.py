"""A run that the driver let spill to the host is no fit."""

from __future__ import annotations

import dataclasses

import pytest
from recorded import configure

from lora_advisor.advisor.spill import without_spills
from lora_advisor.probes.machine import GIB, Machine, Stack
from lora_advisor.probes.prediction import Interval
from lora_advisor.probes.record import ProbeResult

EXPECTED = Interval(value=1.0, low=0.5, high=2.0)
SPILLED = ProbeResult(
    config=configure(),
    architecture="",
    hf_config={},
    machine=Machine(kind="cuda", name="a card", memory_bytes=8 * GIB, capability="8.9"),
    stack=Stack(torch="2.13.0", transformers="5.23.0", peft="0.21.2"),
    outcome="ok",
    process_bytes=int(7.9 * GIB),
    step_times_s=(20.0, 21.0, 22.0),
    tokens_per_step=2048,
)


def test_a_full_card_and_steps_ten_times_too_slow_are_no_fit() -> None:
    settled = without_spills(SPILLED, EXPECTED)
    assert settled.outcome == "out_of_memory"
    assert "21.0 s where at most 2.0 s was expected" in str(settled.detail)


@pytest.mark.parametrize(
    "changes",
    [
        {"step_times_s": (7.9, 7.9, 7.9)},  # slow, but not four times the most expected
        {"process_bytes": 7 * GIB},  # there was room on the card
        {"process_bytes": None},
        {"step_times_s": ()},
        {"outcome": "failed"},
        {"machine": Machine(kind="cpu", name="a CPU", memory_bytes=8 * GIB)},
    ],
)
def test_anything_less_stays_what_it_was(changes: dict[str, object]) -> None:
    result = dataclasses.replace(SPILLED, **changes)  # type: ignore[arg-type]
    assert without_spills(result, EXPECTED) is result


def test_where_nothing_was_expected_nothing_is_concluded() -> None:
    assert without_spills(SPILLED, None) is SPILLED
