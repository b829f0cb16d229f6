"""The methods side by side, stage by stage."""

from __future__ import annotations

import pytest
from recorded import configure, tiny
from traced_once import share_traces

from lora_advisor.advisor.compare import ORDER, STAGES, Comparison, compare
from lora_advisor.advisor.predictor import Predictor
from lora_advisor.advisor.report_compare import compare_json, compare_text
from lora_advisor.probes.cards import find_card
from lora_advisor.probes.machine import GIB

CARD = find_card("rtx-4060")
CONFIGS = [
    configure(
        trainer="transformers",
        loss="full",
        checkpointing="off",
        method=method,
        **({"lora": None} if method == "full" else {}),
    )
    for method in ORDER
]


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Comparison:
    share_traces(monkeypatch)
    figures = tiny(num_hidden_layers=2)
    predictor = Predictor.start(figures, CARD.machine(), CARD, limit_bytes=8 * GIB)
    return compare(CONFIGS, predictor)


def test_the_peak_is_the_largest_of_the_stages(compared: Comparison) -> None:
    for column in compared.columns:
        memory = column.prediction.memory
        assert set(memory.phases) == set(STAGES)
        assert max(memory.phases.values()) == memory.allocated_bytes
        assert memory.phases[column.peak_stage] == memory.allocated_bytes


def test_trained_parameters_are_counted(compared: Comparison) -> None:
    full, lora, qlora = compared.columns
    hidden, inner, layers, vocabulary, rank = 64, 128, 2, 1000, 8
    key_value = hidden // 4 * 2
    linear = [(hidden, hidden), (hidden, key_value), (hidden, key_value), (hidden, hidden),
              (hidden, inner), (hidden, inner), (inner, hidden)]  # fmt: skip
    assert lora.trainable == qlora.trainable == layers * sum(rank * (a + b) for a, b in linear)
    biases, norms = hidden + 2 * key_value, 2 * hidden
    each = sum(a * b for a, b in linear) + biases + norms
    assert full.trainable == vocabulary * hidden + layers * each + hidden


def test_the_table_names_stages_methods_and_how_it_is_known(compared: Comparison) -> None:
    lines = compare_text(compared).splitlines()

    header = next(line for line in lines if line.startswith("GiB"))
    assert header.index("full fine-tuning") < header.index("LoRA") < header.index("QLoRA")
    for stage in ("load", "forward", "loss", "backward", "optimizer step", "peak live",
                  "held by the allocator", "process", "verdict", "trained parameters"):  # fmt: skip
        assert any(line.startswith(stage) for line in lines), stage
    assert sum(line.count("*") for line in lines if line.split()[0:1] != ["stages:"]) == 3
    assert "traced" in lines[-1]


def test_the_json_has_bytes(compared: Comparison) -> None:
    data = compare_json(compared)

    assert data["limit_bytes"] == 8 * GIB
    assert [method["method"] for method in data["methods"]] == list(ORDER)
    for method, column in zip(data["methods"], compared.columns, strict=True):
        assert method["prediction"]["memory"]["phases"] == column.prediction.memory.phases
        assert method["prediction"]["verdict"] == "fits"
