"""Plans for several cards: one card's share, and what the cards are expected to do together."""

from __future__ import annotations

import dataclasses
import random
import statistics
from pathlib import Path
from unittest import mock

import pytest
from made_up_device import Device, plan_with
from traced_once import save_figures, share_traces

from lora_advisor.advisor import scaling as scaling_of
from lora_advisor.advisor.planning import NothingFitsError, make_plan
from lora_advisor.advisor.predictor import Predictor
from lora_advisor.advisor.report import plan_text
from lora_advisor.advisor.scaling import gradient_bytes
from lora_advisor.models.all_reduce import MIB, NCCL_BYTES, all_reduce_s, waiting_s
from lora_advisor.probes.architectures import resolve_architecture
from lora_advisor.probes.cards import cards, find_card, links
from lora_advisor.probes.config import LoraShape, RunConfig
from lora_advisor.probes.machine import GIB
from lora_advisor.probes.plan import Plan
from lora_advisor.probes.scaling import Scaling
from lora_advisor.probes.spec import Spec

FIXED = {
    "precision": "bf16", "method": "lora", "trainer": "trl", "optimizer": "adamw_torch_fused",
    "checkpointing": "off", "kernels": "none", "allocator": "default",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _shared_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    share_traces(monkeypatch)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def spec_of(folder: Path, **changes: object) -> Spec:
    spec = Spec(
        model=save_figures(folder / "tiny"), vram_bytes=8 * GIB, seq_len=256, effective_batch=8,
        gpu="rtx-3090", fixed=FIXED, free_trials=0, gpus=2,
    )  # fmt: skip
    return dataclasses.replace(spec, **changes)  # type: ignore[arg-type]


def test_a_ring_sends_its_share_and_waits_for_each_hop() -> None:
    two, four = all_reduce_s(40 * MIB, 2, 25.0), all_reduce_s(40 * MIB, 4, 25.0)
    # 2 (N - 1) / N of 40 MiB at 25 GB/s, in three buckets of two hops of 20 us for two cards.
    assert two.value == pytest.approx(40 * MIB / 25e9 + 3 * 2 * 2e-5)
    assert four.value == pytest.approx(1.5 * 40 * MIB / 25e9 + 3 * 6 * 2e-5)
    for seconds in (two, four, all_reduce_s(1000, 8, 450.0)):
        assert 0 < seconds.low < seconds.value < seconds.high
    assert all_reduce_s(40 * MIB, 2, 50.0).value < two.value


def test_every_card_names_a_link_of_the_table() -> None:
    for card in cards().values():
        assert card.link in links(), card.key
    assert links()["pcie-4.0-x16"].gb_s == 2 * links()["pcie-3.0-x16"].gb_s
    assert all("https://" in link.source for link in links().values())


@pytest.mark.parametrize(
    ("trainer", "method", "precision"),
    [("trl", "qlora", "bf16"), ("trl", "lora", "bf16"), ("transformers", "full", "bf16")],
)  # fmt: skip
def test_the_gradients_are_as_large_as_those_of_the_trace(
    tmp_path: Path, trainer: str, method: str, precision: str
) -> None:
    config = RunConfig(
        model=save_figures(tmp_path / "tiny"), trainer=trainer, method=method, micro_batch=1,
        accumulation=2, seq_len=64, optimizer="adamw_torch_fused", precision=precision,
        checkpointing="full", attention="sdpa", kernels="none",
        loss="fused" if trainer == "trl" else "full", compile="off", allocator="default",
        lora=None if method == "full" else LoraShape(r=8, alpha=16, dropout=0.0,
                                                     targets="all-linear"),
    )  # fmt: skip
    architecture, card = resolve_architecture(config.model), find_card("rtx-3090")
    predictor = Predictor.start(architecture, card.machine(), card, limit_bytes=8 * GIB)
    trace = predictor.store.get(config)
    births = {
        block: size
        for block, size in zip(trace.blocks.tolist(), trace.sizes.tolist(), strict=True)
        if size > 0
    }
    # A gradient is of the kind of what it is taken for: the adapter, or all weights that train.
    trained = sum(births[block] for block, whose in trace.owners.items() if whose == "adapter")
    assert gradient_bytes(config, trace.trainable) == pytest.approx(trained, rel=0.01)


def test_a_plan_for_two_cards_is_one_card_s_share_of_the_step(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    plan = make_plan(spec, record=tmp_path / "record.jsonl")
    config, scaling = plan.chosen.config, plan.scaling
    assert plan.spec == spec and scaling is not None
    assert config.micro_batch * config.accumulation == 4
    assert scaling.link == "PCIe 4.0 x16" and scaling.set_aside_bytes > NCCL_BYTES
    one, two = plan.chosen.prediction.tokens_per_s, scaling.tokens_per_s
    assert one is not None and two is not None and scaling.efficiency is not None
    assert one.value < two.value < 2 * one.value
    assert 0.5 < scaling.efficiency.low < scaling.efficiency.value <= 1
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.tokens_per_s == two.value
    text = plan_text(plan)
    assert f"each runs {config.micro_batch} x {config.accumulation} accumulation: 8 in a" in text
    assert f"predicted {two.value:,.0f} tokens/s" in text and "scaling efficiency" in text


def test_what_the_cards_hold_beside_the_step_is_left_to_them(tmp_path: Path) -> None:
    # Several cards have no graphs, so the one that they are set beside has none either.
    one = spec_of(tmp_path, gpus=1)
    one = dataclasses.replace(one, fixed={**one.fixed, "cuda_graph": "off"})
    alone = make_plan(one, record=tmp_path / "record.jsonl")
    assert alone.scaling is None
    least = alone.chosen.prediction.memory.process_upper_bytes
    tight = spec_of(tmp_path, vram_bytes=least + NCCL_BYTES // 2)
    assert make_plan(dataclasses.replace(tight, gpus=1), record=tmp_path / "record.jsonl")
    with pytest.raises(NothingFitsError, match=r"\(0.3\d of it are left to DDP and NCCL\)"):
        make_plan(tight, record=tmp_path / "record.jsonl")


def test_probes_run_one_card_s_share_and_nothing_is_known_without_a_link(tmp_path: Path) -> None:
    spec = spec_of(
        tmp_path, device="cpu", gpu=None, seq_len=2048, fixed={"precision": "bf16"}, gpus=2
    )
    device = Device(dataclasses.replace(spec, gpus=1, effective_batch=4))
    plan = plan_with(device, tmp_path, gpus=2, effective_batch=8)
    assert all(config.tokens_per_step <= 4 * 2048 for config in device.probed)
    assert plan.chosen.evidence == "proved" and plan.scaling is not None
    assert plan.scaling.link is None and plan.scaling.tokens_per_s is None
    assert plan.tokens_per_s is None and plan.epoch_s is None
    assert "tokens/s unknown: the link between the cards is not known" in plan_text(plan)


@pytest.mark.parametrize("gpus", [2, 4])
def test_a_step_lasts_as_long_as_the_slowest_card_s(gpus: int) -> None:
    draws = random.Random(gpus)
    times = [draws.gauss(0.5, 0.03) for _ in range(4000)]
    steps = [max(draws.gauss(0.5, 0.03) for _ in range(gpus)) for _ in range(20_000)]
    waiting = waiting_s(times, gpus)
    assert waiting is not None and waiting.low == 0
    assert waiting.value == pytest.approx(statistics.mean(steps) - 0.5, rel=0.05)
    assert waiting_s(times[:2], gpus) is None


def test_cards_whose_steps_vary_are_predicted_to_wait(tmp_path: Path) -> None:
    card = find_card("rtx-3090")
    plan = make_plan(spec_of(tmp_path, gpus=1), record=tmp_path / "record.jsonl")
    predictor = Predictor.start(plan.architecture, card.machine(), card, limit_bytes=8 * GIB)
    session = mock.Mock(card=card, predictor=predictor)
    step = plan.chosen.prediction.step_s
    assert step is not None
    found = []
    for share in (0.0, 0.1):
        times = tuple(step.value * (1 + share * at) for at in (-1, 0, 1, -1, 0, 1))
        measured = mock.Mock(step_times_s=times)
        chosen = mock.Mock(
            config=plan.chosen.config, prediction=plan.chosen.prediction, measured=measured
        )
        with mock.patch.object(scaling_of, "off_by", return_value=1.0):
            found.append(scaling_of._scaling(session, chosen, 2, 0))
    calm, varying = found
    assert calm.waiting_s is not None and calm.waiting_s.value == 0
    assert varying.waiting_s is not None
    assert varying.waiting_s.value == pytest.approx(step.value * 0.1 * 0.8944 * 0.5642, rel=1e-3)
    assert calm.efficiency is not None and varying.efficiency is not None
    assert varying.efficiency.value < calm.efficiency.value <= varying.efficiency.high + 1e-9
    assert Scaling.from_json(varying.to_json()) == varying
