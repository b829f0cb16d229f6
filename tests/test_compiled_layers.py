"""Compiled layers in a training: what dynamo compiles, and what it does not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch._dynamo
from tiny_training import config_of, run

from lora_advisor.probes.config import LoraShape

pytestmark = [pytest.mark.filterwarnings("ignore")]  # torch's compiler warns of itself


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[bool, tuple[int, ...]]]]:
    """What dynamo hands over to be compiled: whether with gradients, and the shape of the states.

    What it hands over runs as it is, for Inductor would take seconds for each.
    """
    seen: list[tuple[bool, tuple[int, ...]]] = []

    def backend(graph: Any, inputs: Any) -> Any:
        states = [i for i in inputs if isinstance(i, torch.Tensor) and i.dim() == 3]
        seen.append((torch.is_grad_enabled(), tuple(states[0].shape)))
        return graph.forward

    def compile_(module: Any, **words: Any) -> None:
        assert words == {"dynamic": False}
        module._compiled_call_impl = torch.compile(
            module._call_impl, backend=backend, dynamic=False
        )

    torch._dynamo.reset()
    limit = torch._dynamo.config.recompile_limit
    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    yield seen
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit  # a build raises it for the process


@pytest.mark.parametrize(("trainer", "rows"), [("trl", 7), ("transformers", 8), ("trl", 13)])
def test_a_training_compiles_its_micro_batches_and_nothing_else(
    tmp_path: Path,
    tiny: Path,
    programs: list[tuple[bool, tuple[int, ...]]],
    trainer: str,
    rows: int,
) -> None:
    config = config_of(
        tiny,
        trainer=trainer,
        loss="fused" if trainer == "trl" else "full",
        compile="layers",
        micro_batch=rows,
        accumulation=1,
        lora=LoraShape(r=4, alpha=8, dropout=0.0, targets="all-linear"),
    )
    result = run(
        config, tiny / "rows.jsonl", tmp_path / "out",
        max_steps=None, epochs=3.0, check_rows=8, eval_steps=3, eval_batch=5,
    )  # fmt: skip
    assert result.holdout_rows
    assert result.known is not None
    assert len(result.evaluations) > 2
    # The loss of rows is asked for in batches of 5, and of the epoch's last rows: none is compiled.
    # Nor is what is left for an epoch's last micro-batch, where it is half of one or less.
    left = result.rows % rows
    assert left, result.rows
    sizes = {rows, left} if 2 * left > rows else {rows}
    assert {shape[:2] for _, shape in programs} == {(size, 96) for size in sizes}
    assert all(gradients for gradients, _ in programs)
    assert len(programs) == len(set(programs)) * 2  # the first layer's input wants no gradient
    assert json.loads((tmp_path / "out" / "result.json").read_text("utf-8"))["steps"] > 6


def test_evaluations_of_a_compiled_model_are_those_of_the_plain_one(
    tmp_path: Path, tiny: Path, programs: list[tuple[bool, tuple[int, ...]]]
) -> None:
    losses = []
    for compiled in ("off", "layers"):
        config = config_of(
            tiny,
            compile=compiled,
            lora=LoraShape(r=4, alpha=8, dropout=0.0, targets="all-linear"),
        )
        result = run(config, tiny / "rows.jsonl", tmp_path / compiled, max_steps=4)
        losses.append((result.eval_loss_before, result.eval_loss_after))
        assert bool(programs) == (compiled == "layers")
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
