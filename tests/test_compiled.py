"""Compiled layers: what fuses has no buffer, what is kept is what recorded runs kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_advisor.models.replayed import traced_memory
from lora_advisor.probes.architectures import from_hf_config
from lora_advisor.probes.compiled_semantics import compiled_layers
from lora_advisor.probes.events import Event
from lora_advisor.probes.extend import trace_all_layers
from lora_advisor.probes.record import ProbeResult, read_records
from lora_advisor.probes.recorder import Recorder

RECORDS = read_records(Path(__file__).parent / "recordings/h100-compiled-layers-2026-11-24.jsonl")
ROWS, WIDTH, OUT = 256, 512, 128
WIDE, NARROW = ROWS * WIDTH * 2, ROWS * OUT * 2  # bytes in bf16


class Chain(torch.nn.Module):
    """Three operations an element, then a product; compiled, the three are one kernel."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.empty(WIDTH, OUT, dtype=torch.bfloat16)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.mm(torch.sin(x) * 2 + 1, self.weight)


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
def test_a_fused_chain_allocates_its_result_and_its_gradient_only() -> None:
    passes = _passes_of_the_chain()

    # The product's input goes when the product is done: the backward pass needs x alone.
    assert passes["forward"] == [WIDE, NARROW, -WIDE]
    # The chain's gradient overwrites the product's.
    assert passes["backward"] == [WIDE]


def _passes_of_the_chain() -> dict[str, list[int]]:
    recorder = Recorder(None)
    with FakeTensorMode(), compiled_layers(), recorder:
        module = Chain()
        module.compile()
        x = torch.empty(ROWS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        gradient = torch.empty(ROWS, OUT, dtype=torch.bfloat16)
        recorder.phase = "forward"
        result = module(x)
        recorder.phase = "backward"
        torch.autograd.backward(result, gradient)
        events: list[Event] = list(recorder.events)
        recorder.closed = True
    return {
        phase: [
            event.size
            for event in events
            if event.phase == phase and abs(event.size) in (WIDE, NARROW)  # no workspaces
        ]
        for phase in ("forward", "backward")
    }


def _name(result: ProbeResult) -> str:
    config = result.config
    dropout = "dropout" if config.lora is not None and config.lora.dropout else "plain"
    packing = "packed" if config.packing else "padded"
    return (
        f"{config.model}-{config.trainer}-{config.method}-{config.checkpointing}-"
        f"{config.attention}-{dropout}-{packing}-{config.accumulation}"
    )


@pytest.mark.parametrize("result", RECORDS, ids=_name)
def test_the_trace_of_recorded_compiled_layers_is_within_half_a_per_cent(
    result: ProbeResult,
) -> None:
    _skip_where_the_partitioner_differs(result)
    architecture = from_hf_config("recorded", dict(result.hf_config))
    capability = result.machine.capability

    trace = trace_all_layers(result.config, architecture, capability=capability)

    traced = traced_memory(trace, expandable=False)
    assert traced.allocated_bytes == pytest.approx(result.allocated_bytes, rel=0.005)


def _skip_where_the_partitioner_differs(result: ProbeResult) -> None:
    """What an autograd.Function computes under checkpointing is saved by torch 2.11, not 2.13."""
    config: Any = result.config
    quantised = config.method == "qlora" and not config.fp32_upcast
    if quantised and config.checkpointing == "full":
        recorded = result.stack.torch.rpartition(".")[0]
        if not torch.__version__.startswith(recorded):
            pytest.skip(f"torch {recorded} partitions this layer otherwise")
