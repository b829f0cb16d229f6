"""Stage "dpo": the step of TRL's DPOTrainer, traced, probed and planned like any other."""

from __future__ import annotations

import json
import math
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded import configure, tiny
from tiny_model import save_model, save_pairs
from traced_once import save_figures

from lora_advisor.advisor.baseline import baseline_config
from lora_advisor.advisor.datafit import summarise_pairs
from lora_advisor.advisor.time_ahead import promised, seconds_per_token
from lora_advisor.cli import main
from lora_advisor.models.replayed import traced_memory
from lora_advisor.probes.architectures import resolve_architecture
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.dataset import random_rows
from lora_advisor.probes.errors import UsageError
from lora_advisor.probes.events import Work
from lora_advisor.probes.extend import trace_all_layers
from lora_advisor.probes.finetune import (
    Schedule,
    build_trainer,
    decoder_layers,
    padding_tokenizer,
)
from lora_advisor.probes.machine import GIB, cpu_machine, detect_stack
from lora_advisor.probes.pair_tokens import pair_tokens, tokenize_pairs
from lora_advisor.probes.pairs import read_pairs
from lora_advisor.probes.plan import read_plan
from lora_advisor.probes.preference import as_trained
from lora_advisor.probes.runner import run_probe
from lora_advisor.probes.spec import Spec
from lora_advisor.probes.tokens import load_tokenizer
from lora_advisor.probes.trace import trace_step
from lora_advisor.probes.weights import load_model

#: peft 0.21 and TRL 1.16 ask transformers 5.23 by names that transformers calls deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tiny") / "model"
    save_model(path)
    return str(path)


def test_a_micro_batch_counts_pairs_and_tokens_both_sequences() -> None:
    config = configure(stage="dpo", micro_batch=3, accumulation=2, seq_len=100)

    assert (config.sequences, config.tokens, config.tokens_per_step) == (6, 600, 1200)
    assert RunConfig.from_json(config.to_json()) == config
    assert "stage" not in configure().to_json()  # older programs can read it


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trainer": "transformers", "loss": "full"}, "`trainer` must be trl"),
        ({"packing": True}, "`packing` must be False"),
        ({"group_by_length": True}, "`group_by_length` must be False"),
        ({"method": "full", "lora": None}, "second model"),
        ({"stage": "rlhf"}, "one of sft, dpo"),
    ],
)
def test_what_pairs_do_not_go_with_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        configure(**{"stage": "dpo", **changes})


def test_full_pairs_have_a_loss_on_nearly_all_tokens() -> None:
    rows = random_rows(2, 16, 50)
    config = configure(stage="dpo")

    pairs = as_trained(config, rows)

    assert as_trained(configure(), rows) is rows
    for pair, row in zip(pairs, rows, strict=True):
        assert pair["prompt_ids"] + pair["chosen_ids"] == row["input_ids"]
        assert len(pair["prompt_ids"] + pair["rejected_ids"]) == 16
        assert pair["rejected_ids"] != pair["chosen_ids"]


# The trace ---------------------------------------------------------------------------------------

WIDE = tiny(hidden_size=512, intermediate_size=1024, num_key_value_heads=4, num_hidden_layers=2)


@cache
def work_of(**changes: Any) -> Work:
    config = configure(seq_len=512, checkpointing="off", **changes)
    return trace_step(config, WIDE, capability="9.0").total_work()


def test_the_reference_costs_one_more_pass_forward() -> None:
    pair = work_of(stage="dpo", micro_batch=1)
    rows = work_of(stage="sft", micro_batch=2)
    layers, heads, width = 2, 4, 128
    product = 2 * 2 * heads * 512 * 512 * width / 2  # of two rows, a causal half

    assert pair.attention_flops == layers * (7 + 2) * product
    assert rows.attention_flops == layers * 7 * product
    # Forward, and backward to the input: a third more where nothing is computed again.
    assert 1.3 < pair.matmul_flops / rows.matmul_flops < 1.6


@pytest.mark.parametrize("changes", [{}, {"adapter": "fused"}, {"checkpointing": "every_2"}])
def test_few_layers_stand_for_all(changes: dict[str, Any]) -> None:
    architecture = tiny(num_hidden_layers=13)
    config = configure(stage="dpo", seq_len=256, **changes)

    few = traced_memory(trace_all_layers(config, architecture), expandable=False, cap_bytes=1 << 60)
    all_ = traced_memory(trace_step(config, architecture), expandable=False, cap_bytes=1 << 60)

    assert few.allocated_bytes == all_.allocated_bytes
    assert few.phases["backward"] == all_.phases["backward"]


# The step ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["peft", "fused"])
def test_pairs_are_learnt_against_the_model_without_its_adapter(folder: str, adapter: str) -> None:
    from transformers import PrinterCallback

    config = configure(
        model=folder, stage="dpo", precision="fp32", micro_batch=4, seq_len=24, adapter=adapter,
        method="lora",
    )  # fmt: skip
    torch.manual_seed(0)
    trainer = build_trainer(
        config,
        load_model(config, resolve_architecture(folder), "cpu"),
        rows=as_trained(config, random_rows(16, 24, 259)),
        tokenizer=padding_tokenizer(259),
        schedule=Schedule(
            max_steps=30, learning_rate=3e-3, logging_steps=1, output_dir=tempfile.gettempdir()
        ),
        device="cpu",
    )
    trainer.remove_callback(PrinterCallback)

    trainer.train()

    logs = [log for log in trainer.state.log_history if "loss" in log]
    # The adapter starts at zero, where policy and reference agree.
    assert logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert logs[-1]["loss"] < 0.8 * logs[0]["loss"]
    assert logs[-1]["rewards/accuracies"] == 1.0
    assert logs[-1]["rewards/margins"] > 0.1


@pytest.mark.parametrize(("checkpointing", "layers"), [("full", [1, 1]), ("every_2", [1, 0])])
def test_layers_stay_checkpointed_as_asked_after_the_first_reference(
    folder: str, checkpointing: str, layers: list[int]
) -> None:
    from transformers import PrinterCallback, TrainerCallback

    config = configure(
        model=folder, stage="dpo", precision="fp32", micro_batch=2, accumulation=2, seq_len=24,
        method="lora", checkpointing=checkpointing,
    )  # fmt: skip
    seen = []

    class Look(TrainerCallback):
        """Notes which layers are checkpointed, and the hooks on the embeddings."""

        def on_step_end(self, *_: Any, model: Any = None, **__: Any) -> None:
            flags = [int(layer.gradient_checkpointing) for layer in decoder_layers(model)]
            hooks = len(model.get_base_model().get_input_embeddings()._forward_hooks)
            seen.append((flags, hooks))

    trainer = build_trainer(
        config,
        load_model(config, resolve_architecture(folder), "cpu"),
        rows=as_trained(config, random_rows(12, 24, 259)),
        tokenizer=padding_tokenizer(259),
        schedule=Schedule(max_steps=3, output_dir=tempfile.gettempdir()),
        device="cpu",
        callbacks=[Look()],
    )
    trainer.remove_callback(PrinterCallback)

    trainer.train()

    assert [flags for flags, _ in seen] == [layers] * 3
    assert len({hooks for _, hooks in seen}) == 1


def test_a_probe_of_pairs_runs_and_counts_both_sequences(tmp_path: Path) -> None:
    architecture = tiny(num_hidden_layers=2, vocab_size=500)
    config = configure(stage="dpo", precision="fp32", micro_batch=2, seq_len=32, method="lora")

    result = run_probe(
        config,
        architecture,
        cpu_machine(),
        detect_stack(),
        cap_bytes=None,
        record=tmp_path / "record.jsonl",
        device="cpu",
        warmup_steps=2,
        measured_steps=2,
        max_seconds=5.0,
        timeout_s=120.0,
    )

    assert (result.outcome, result.detail) == ("ok", None)
    assert result.config.stage == "dpo"
    assert result.tokens_per_step == 2 * 2 * 32
    assert result.step_s is not None
    assert result.tokens_per_s == pytest.approx(result.tokens_per_step / result.step_s)


# Planning ----------------------------------------------------------------------------------------


def test_the_baseline_is_trls_trainer_on_pairs() -> None:
    spec = Spec(model="qwen2.5-0.5b", vram_bytes=GIB, fixed={"stage": "dpo"})

    baseline = baseline_config(spec, "bf16")

    assert (baseline.stage, baseline.trainer, baseline.method) == ("dpo", "trl", "qlora")
    plain = baseline_config(Spec(model="qwen2.5-0.5b", vram_bytes=GIB), "bf16")
    assert plain.trainer == "transformers"


def test_a_plan_for_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--model", save_figures(tmp_path / "tiny"), "--gpu", "rtx-4060", "--seq", "64",
        "--method", "lora", "--checkpointing", "full", "--optimizer", "adamw_torch_fused",
    ]  # fmt: skip

    assert main(["plan", "--stage", "dpo", *words, "--batch", "2", "--json"]) == 0

    plan = json.loads(capsys.readouterr().out)
    config = RunConfig.from_json(plan["chosen"]["config"])
    assert config.stage == "dpo"
    assert config.micro_batch * config.accumulation == 2
    assert RunConfig.from_json(plan["baseline"]["config"]).stage == "dpo"
    assert main(["fit", "--stage", "dpo", *words, "--no-largest"]) == 0
    assert "1 pairs x 64" in capsys.readouterr().out


def test_a_plan_with_pairs_prices_a_pass_over_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "model")
    save_pairs(tmp_path / "pairs.jsonl", count=30)
    words = [
        "--model", str(tmp_path / "model"), "--gpu", "rtx-4060", "--data",
        str(tmp_path / "pairs.jsonl"), "--stage", "dpo", "--method", "lora", "--batch", "4",
        "--micro-batch", "4", "--checkpointing", "full", "--optimizer", "adamw_torch_fused",
    ]  # fmt: skip
    assert main(["plan", *words, "--out", str(tmp_path / "plan.json")]) == 0
    said = capsys.readouterr().out
    assert "your data: 30 pairs, " in said and "one epoch" in said
    assert "tokens of the longer sequence of a pair (quantiles): " in said
    assert "baseline (TRL's DPOTrainer, " in said

    plan = read_plan(tmp_path / "plan.json")
    rows = tokenize_pairs(
        read_pairs(tmp_path / "pairs.jsonl"),
        load_tokenizer(resolve_architecture(str(tmp_path / "model"))),
        1000,
    )
    # The longest pair has 62 tokens, so the next 64 cover all.
    assert (max(rows.lengths), plan.chosen.config.seq_len) == (62, 64)
    data, (batching,) = plan.data, plan.batchings  # pairs are neither grouped nor packed
    assert data is not None
    assert (data.rows, data.sequences, data.truncated) == (30, 2, 0)
    assert data.tokens == batching.useful_tokens == sum(pair_tokens(row) for row in rows.rows)
    assert (batching.name, batching.micro_batches, batching.optimizer_steps) == ("random", 8, 8)
    assert data.tokens < batching.computed_tokens <= 2 * 30 * 62
    assert batching.seconds is not None and plan.epoch_s == batching.seconds.value
    assert seconds_per_token(plan) == batching.seconds.value / batching.computed_tokens
    promise = promised(plan)
    assert promise.start_seconds is None  # no run has told
    assert promise.peak_bytes == plan.chosen.prediction.memory.process_bytes

    cut, seq_len = summarise_pairs(tmp_path / "pairs.jsonl", plan.architecture, 60)
    assert (seq_len, cut.length_counts[-1][0]) == (60, 60)
    assert cut.truncated == sum(length > 60 for length in rows.lengths) > 0


def test_pairs_in_a_plan_need_a_tokenizer_and_are_neither_grouped_nor_packed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "model")
    save_pairs(tmp_path / "pairs.jsonl", count=3)
    plan = ["plan", "--stage", "dpo", "--data", str(tmp_path / "pairs.jsonl"), "--gpu", "rtx-4060"]
    assert main(plan) == 64
    assert "needs the model's tokenizer" in capsys.readouterr().err
    for option, why in (("--packing", "does not pack"), ("--group-by-length", "`input_ids`")):
        assert main([*plan, "--model", str(tmp_path / "model"), option]) == 64
        said = capsys.readouterr().err
        assert why in said and "Traceback" not in said
