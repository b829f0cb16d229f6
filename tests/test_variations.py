"""What the search leaves out where speeds are a card's figures: never what would have won."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from recorded import TINY
from traced_once import save_figures, share_traces

from lora_advisor.advisor import traces
from lora_advisor.advisor.predictor import Predictor
from lora_advisor.advisor.search import SearchResult, search
from lora_advisor.advisor.seen import Seen
from lora_advisor.advisor.space import build_space
from lora_advisor.advisor.traces import TraceStore
from lora_advisor.probes.architectures import resolve_architecture
from lora_advisor.probes.cards import find_card
from lora_advisor.probes.config import LoraShape, RunConfig
from lora_advisor.probes.machine import GIB, detect_stack
from lora_advisor.probes.spec import Spec
from lora_advisor.probes.trace_batch import Batch

CARD = find_card("rtx-4060")


@pytest.fixture(autouse=True)
def _shared_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    share_traces(monkeypatch)


def searched(model: str, limit_bytes: int, *, all_of_it: bool = False) -> SearchResult:
    spec = Spec(
        model=model,
        vram_bytes=GIB,
        seq_len=2048,
        effective_batch=4,
        fixed={"method": "lora", "kernels": "none"},
    )
    predictor = Predictor.start(
        resolve_architecture(model),
        CARD.machine(),
        CARD,
        limit_bytes=limit_bytes,
        context_bytes=GIB // 4,
    )
    space = build_space(spec, CARD.machine(), detect_stack(), CARD)
    roofline = mock.PropertyMock(return_value=not all_of_it)
    with mock.patch.object(Predictor, "is_roofline", roofline):
        return search(space, predictor, objective="tokens_per_s", seed=0)


def looked_at(found: SearchResult) -> set[RunConfig]:
    return {candidate.config for candidate in (*found.feasible, *found.infeasible)}


@pytest.mark.parametrize("limit", [0.42, 0.5, 0.6, 0.75, 1.0])
def test_what_is_left_out_would_not_have_won(tmp_path: Path, limit: float) -> None:
    model = save_figures(tmp_path / "tiny")
    every = searched(model, int(limit * GIB), all_of_it=True)
    fewer = searched(model, int(limit * GIB))

    assert fewer.feasible[0].config == every.feasible[0].config
    assert len(looked_at(fewer)) < len(looked_at(every))


def test_other_optimizers_are_left_out_where_they_make_no_room(tmp_path: Path) -> None:
    model = save_figures(tmp_path / "tiny")
    every = searched(model, GIB, all_of_it=True)
    fewer = searched(model, GIB)

    assert len({config.optimizer for config in looked_at(every)}) == 4
    others = [config for config in looked_at(fewer) if config.optimizer != "adamw_torch_fused"]
    fitting = {c.config for c in fewer.feasible if c.prediction.verdict == "fits"}
    assert not any(c.replace(optimizer="adamw_torch_fused") in fitting for c in others)


def test_layers_recomputed_in_between_take_a_time_in_between(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "num_hidden_layers": 16}))
    predictor = Predictor.start(
        resolve_architecture(str(tmp_path)), CARD.machine(), CARD, limit_bytes=GIB
    )
    seen = Seen("micro_batch", GIB)
    asked = RunConfig(
        model=str(tmp_path), trainer="trl", method="lora", micro_batch=2, accumulation=2,
        seq_len=2048, optimizer="adamw_torch_fused", precision="bf16", checkpointing="every_4",
        attention="sdpa", kernels="none", loss="fused", compile="off", allocator="default",
        lora=LoraShape(r=16, alpha=32, dropout=0.0, targets="all-linear"),
    )  # fmt: skip
    assert seen.speed_at_most(asked) is None
    seen.add(predictor.candidate(asked.replace(checkpointing="off")))
    assert seen.speed_at_most(asked) is None  # nothing that recomputes more is known
    seen.add(predictor.candidate(asked.replace(checkpointing="full")))
    found = predictor.candidate(asked).tokens_per_s
    assert found is not None
    assert seen.speed_at_most(asked) == pytest.approx(found, rel=0.02)
    assert seen.speed_at_most(asked.replace(precision="fp16")) is None


class Server:
    """Stands for the fork server: notes what it shall trace, and traces nothing."""

    def __init__(self) -> None:
        self.batches: list[list[RunConfig]] = []

    def trace(self, batch: Batch) -> list[Any]:
        self.batches.append(list(batch.configs))
        return []


def store_and_configs(folder: Path, server: Any) -> tuple[TraceStore, list[RunConfig]]:
    """Return a store that traces in a server, and configurations that differ in length."""
    spec = Spec(model=save_figures(folder), vram_bytes=GIB, effective_batch=1)
    space = build_space(spec, CARD.machine(), detect_stack(), CARD)
    config = next(space.configs()).replace(allocator="default")  # as traces are asked for
    store = TraceStore(
        resolve_architecture(spec.model), CARD.machine().capability, server=server
    )  # fmt: skip
    return store, [config.replace(seq_len=64 * n) for n in range(1, 13)]


@pytest.mark.parametrize(
    ("asked", "cores", "traced"), [(1, 2, 2), (2, 2, 2), (3, 2, 4), (1, 4, 4), (6, 4, 8)]
)
def test_idle_cores_trace_what_may_be_asked_for_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: int, cores: int, traced: int
) -> None:
    monkeypatch.setattr(traces, "has_imported", lambda: False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    server: Any = Server()
    store, configs = store_and_configs(tmp_path / "tiny", server)
    store.prepare(configs[:asked], ahead=configs[asked - 1 :])
    assert server.batches == [configs[:traced]]


def test_nothing_is_traced_ahead_where_nothing_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traces, "has_imported", lambda: False)
    server: Any = Server()
    store, configs = store_and_configs(tmp_path / "tiny", server)
    store.prepare([], ahead=configs)
    assert server.batches == []
