from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from lora_advisor.advisor.epochs import data_report
from lora_advisor.advisor.lengths import length_counts
from lora_advisor.advisor.report import plan_text
from lora_advisor.advisor.report_data import data_text, lengths_text
from lora_advisor.probes.architectures import load_bundled
from lora_advisor.probes.batching import Batching
from lora_advisor.probes.config import LoraShape, RunConfig
from lora_advisor.probes.machine import GIB, cpu_machine, detect_stack
from lora_advisor.probes.plan import Candidate, DataSummary, Plan, read_plan, write_plan
from lora_advisor.probes.prediction import Interval, MemoryPrediction, Prediction
from lora_advisor.probes.spec import Spec

CONFIG = RunConfig(
    model="qwen2.5-0.5b",
    method="lora",
    micro_batch=4,
    accumulation=2,
    seq_len=512,
    optimizer="adamw_torch_fused",
    precision="bf16",
    checkpointing="full",
    attention="sdpa",
    kernels="none",
    loss="fused",
    lora=LoraShape(r=16, alpha=32, dropout=0.0, targets="all-linear"),
    compile="off",
    allocator="default",
)

LENGTHS = [*range(41, 141)] * 2 + [512] * 6


def summary(lengths: list[int] = LENGTHS, *, truncated: int = 0) -> DataSummary:
    return DataSummary(
        path="rows.jsonl",
        rows=len(lengths),
        tokens=sum(lengths),
        truncated=truncated,
        dropped=0,
        length_counts=length_counts(lengths),
    )


def price(config: RunConfig) -> Interval:
    seconds = 1e-4 * config.tokens
    return Interval(value=seconds, low=0.8 * seconds, high=1.25 * seconds)


def plan_of(data: DataSummary | None, batchings: tuple[Batching, ...] = (), **changes: Any) -> Plan:
    memory = MemoryPrediction(
        allocated_bytes=GIB,
        reserved_bytes=GIB,
        process_bytes=GIB,
        process_upper_bytes=GIB,
        needed_bytes=GIB,
        instant="loss",
        components={},
        phases={},
        evidence="traced",
    )
    speed = Interval(value=10_000.0, low=8_000.0, high=12_500.0)
    prediction = Prediction(
        memory=memory, verdict="fits", step_s=None, tokens_per_s=speed, evidence="traced"
    )
    return Plan(
        spec=Spec(model=CONFIG.model, vram_bytes=8 * GIB),
        machine=cpu_machine(),
        stack=detect_stack(),
        architecture=load_bundled(CONFIG.model),
        chosen=Candidate(config=CONFIG.replace(**changes), prediction=prediction),
        baseline=None,
        runners_up=(),
        rejected=(),
        excluded=(),
        cap_bytes=None,
        context_bytes=None,
        probes=0,
        reused=0,
        probing_s=0.0,
        wall_s=1.0,
        trials=1,
        data=data,
        batchings=batchings,
    )


def test_the_lengths_are_told_in_quantiles_and_bars() -> None:
    text = lengths_text(summary(truncated=3))
    first, _, *bars = text.splitlines()

    assert first == (
        "tokens of a row (quantiles): 5 % 46, 25 % 66, 50 % 92, 75 % 118, 95 % 138, 99 % 512, "
        "longest 512; 1.5 % of the rows are cut"
    )
    told = [tuple(bar.replace(" to ", "-").split()) for bar in bars]
    assert [line[:2] for line in told] == [
        ("1-64", "48"),
        ("65-128", "128"),
        ("129-192", "24"),
        ("193-256", "0"),
        ("257-320", "0"),
        ("321-384", "0"),
        ("385-448", "0"),
        ("449-512", "6"),
    ]
    assert [len(line[2]) if len(line) > 2 else 0 for line in told] == [15, 40, 8, 0, 0, 0, 0, 2]


@pytest.mark.parametrize("lengths", [[7], [2, 3], [1000] * 3])
def test_few_lengths_are_told_too(lengths: list[int]) -> None:
    text = lengths_text(summary(lengths))

    assert f"longest {max(lengths):,}; no row is cut" in text
    rows = sum(int(line.split()[3]) for line in text.splitlines()[2:])
    assert rows == len(lengths)


def test_the_report_sets_the_batchings_side_by_side() -> None:
    data = summary()
    plan = plan_of(data, data_report(data, CONFIG, price))
    text = data_text(plan)

    assert text is not None and text in plan_text(plan)
    random_, grouped, packed = text.splitlines()[-5:-2]
    assert random_.startswith("random (planned) ")
    assert grouped.startswith("grouped (--group-by-length) ")
    assert packed.startswith("packed (--packing) ")
    assert " 0.0 % " in packed and " 0.0 % " not in random_
    assert "10,000 tokens/s (8,000 to 12,500)" in packed
    chosen = plan.batching
    assert chosen is not None and chosen.seconds is not None
    assert plan.epoch_s == chosen.seconds.value < data.rows * 512 / 10_000
    whole = plan_of(data, data_report(data, CONFIG, price), group_by_length=True)
    assert whole.epoch_s is not None and whole.epoch_s < plan.epoch_s
    assert "rows           grouped" in plan_text(whole)


def test_without_prices_or_lengths_less_is_said() -> None:
    data = summary()
    unpriced = plan_of(data, data_report(data, CONFIG))
    text = data_text(unpriced)
    assert text is not None and text.count("unknown") == 6
    assert unpriced.epoch_s == data.rows * 512 / 10_000

    old = dataclasses.replace(data, length_counts=())
    assert data_text(plan_of(old)) is None
    assert data_text(plan_of(None)) is None
    assert "tokens; one epoch" in plan_text(plan_of(old))


def test_a_plan_keeps_lengths_and_batchings(tmp_path: Path) -> None:
    data = summary()
    plan = plan_of(data, data_report(data, CONFIG, price), group_by_length=True)
    write_plan(tmp_path / "plan.json", plan)

    assert read_plan(tmp_path / "plan.json") == plan
    kept = json.loads((tmp_path / "plan.json").read_text("utf-8"))
    assert kept["data"]["length_counts"]["512"] == 6
    assert kept["chosen"]["config"]["group_by_length"] is True


def test_an_older_plan_is_read(tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.json", plan_of(summary()))
    kept = json.loads((tmp_path / "plan.json").read_text("utf-8"))
    del kept["data"]["length_counts"], kept["batchings"]
    (tmp_path / "plan.json").write_text(json.dumps(kept), "utf-8")
    plan = read_plan(tmp_path / "plan.json")

    assert plan.data is not None and plan.data.length_counts == ()
    assert plan.batchings == ()
