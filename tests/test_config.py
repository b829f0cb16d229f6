from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from lora_advisor.probes.config import OPTIMIZERS, LoraShape, RunConfig
from lora_advisor.probes.errors import UsageError

RECORDED = Path(__file__).resolve().parents[2] / "shared" / "data" / "h100_runs.jsonl"

LORA = {"r": 16, "alpha": 32, "dropout": 0.0, "targets": "all-linear"}

#: Every field that has no default, and `lora`, which all methods but "full" need.
LEAST: dict[str, Any] = {
    "model": "qwen2.5-1.5b",
    "method": "lora",
    "micro_batch": 2,
    "seq_len": 512,
    "optimizer": "adamw_torch_fused",
    "precision": "bf16",
    "checkpointing": "full",
    "attention": "sdpa",
    "kernels": "none",
    "loss": "fused",
    "lora": LORA,
    "compile": "off",
    "allocator": "default",
}


def read(**changes: Any) -> RunConfig:
    """Read LEAST with some fields changed."""
    return RunConfig.from_json({**LEAST, **changes})


def refusal(**changes: Any) -> str:
    """Return the sentence with which LEAST, changed, is refused."""
    with pytest.raises(UsageError) as caught:
        read(**changes)
    return str(caught.value)


def test_absent_fields_take_their_defaults() -> None:
    config = read()

    assert config.trainer == "trl"
    assert config.accumulation == 1
    assert config.fp32_upcast is False
    assert config.packing is False
    assert config.group_by_length is False
    assert config.quant_type is None
    assert config.double_quant is None


def test_qlora_defaults_to_nf4_with_double_quantisation() -> None:
    config = read(method="qlora")

    assert (config.quant_type, config.double_quant) == ("nf4", True)


def test_qlora_keeps_what_is_given() -> None:
    config = read(method="qlora", quant_type="fp4", double_quant=False)

    assert (config.quant_type, config.double_quant) == ("fp4", False)


def test_the_json_has_exactly_the_fields_of_the_contract() -> None:
    contract = (
        "model trainer method quant_type double_quant micro_batch accumulation seq_len optimizer "
        "precision checkpointing attention kernels loss fp32_upcast lora compile allocator packing"
    )

    assert list(read().to_json()) == contract.split()
    assert list(read().to_json()["lora"]) == ["r", "alpha", "dropout", "targets"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "qlora"},
        {"method": "full", "lora": None},
        {"lora": {**LORA, "targets": ["q_proj", "v_proj"]}},
        {"trainer": "loop", "loss": "full", "checkpointing": "every_3", "compile": "layers"},
        {"packing": True, "attention": "flash_attention_2", "allocator": "expandable_segments"},
        {"group_by_length": True},
    ],
)
def test_json_goes_round(changes: dict[str, Any]) -> None:
    config = read(**changes)

    assert RunConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_an_unknown_field_is_named_with_the_fields_there_are() -> None:
    message = refusal(gradient_checkpointing=True)

    assert message.startswith("`gradient_checkpointing` is not a field of RunConfig")
    assert "checkpointing" in message


@pytest.mark.parametrize("field", sorted(set(LEAST) - {"lora"}))
def test_a_missing_field_is_named(field: str) -> None:
    data = {key: value for key, value in LEAST.items() if key != field}

    with pytest.raises(UsageError, match=f"^`{field}` must be given"):
        RunConfig.from_json(data)


@pytest.mark.parametrize("field", sorted(LORA))
def test_a_missing_field_of_the_adapter_is_named(field: str) -> None:
    lora = {key: value for key, value in LORA.items() if key != field}

    assert refusal(lora=lora).startswith(f"`lora.{field}` must be given")


@pytest.mark.parametrize("data", [None, [], "lora", 3])
def test_what_is_no_object_is_refused(data: object) -> None:
    with pytest.raises(UsageError, match="must be a JSON object"):
        RunConfig.from_json(data)


@pytest.mark.parametrize(
    ("changes", "field", "reason"),
    [
        ({"model": ""}, "model", "name or a path"),
        ({"trainer": "axolotl"}, "trainer", "one of trl, transformers, loop"),
        ({"method": "dora"}, "method", "one of lora, qlora, full"),
        ({"method": "qlora", "quant_type": "int4"}, "quant_type", "one of nf4, fp4"),
        ({"method": "qlora", "double_quant": "yes"}, "double_quant", "true or false"),
        ({"quant_type": "nf4"}, "quant_type", "does not quantise"),
        ({"double_quant": True}, "double_quant", "does not quantise"),
        ({"micro_batch": 0}, "micro_batch", "at least 1"),
        ({"micro_batch": 1.5}, "micro_batch", "whole number"),
        ({"micro_batch": True}, "micro_batch", "whole number"),
        ({"accumulation": 0}, "accumulation", "at least 1"),
        ({"seq_len": 1}, "seq_len", "at least 2"),
        ({"optimizer": "adam"}, "optimizer", "adamw_torch"),
        ({"precision": "fp8"}, "precision", "one of bf16, fp16, fp32"),
        ({"checkpointing": "yes"}, "checkpointing", "every_N"),
        ({"checkpointing": "every_1"}, "checkpointing", "at least 2"),
        ({"checkpointing": "every_0"}, "checkpointing", "at least 2"),
        ({"checkpointing": "unsloth"}, "checkpointing", "every_N"),
        ({"attention": "xformers"}, "attention", "one of sdpa"),
        ({"kernels": "triton"}, "kernels", "one of none, liger"),
        ({"loss": "chunked"}, "loss", "one of full, fused"),
        ({"compile": "reduce-overhead"}, "compile", "one of off, layers, model"),
        ({"allocator": "async"}, "allocator", "one of default, expandable_segments"),
        ({"fp32_upcast": 1}, "fp32_upcast", "true or false"),
        ({"packing": "wrapped"}, "packing", "true or false"),
        ({"lora": None}, "lora", "must be given"),
        ({"lora": {**LORA, "r": 0}}, "lora.r", "at least 1"),
        ({"lora": {**LORA, "alpha": 0}}, "lora.alpha", "above 0"),
        ({"lora": {**LORA, "dropout": 1.0}}, "lora.dropout", r"\[0, 1\)"),
        ({"lora": {**LORA, "dropout": "none"}}, "lora.dropout", "must be a number"),
        ({"lora": {**LORA, "targets": "q_proj"}}, "lora.targets", "all-linear"),
        ({"lora": {**LORA, "targets": []}}, "lora.targets", "at least one module"),
        ({"lora": {**LORA, "targets": 3}}, "lora.targets", "all-linear"),
        ({"lora": {**LORA, "rank": 8}}, "lora.rank", "not a field"),
        ({"method": "full"}, "lora", "trains no adapter"),
        ({"method": "full", "lora": None, "fp32_upcast": True}, "fp32_upcast", "freezes"),
        ({"loss": "full"}, "loss", "SFTTrainer"),
        ({"trainer": "transformers"}, "loss", "no fused loss of its own"),
        ({"trainer": "loop"}, "loss", "no fused loss of its own"),
        ({"trainer": "loop", "loss": "full", "packing": True}, "packing", 'only "trl" packs'),
        ({"packing": True, "group_by_length": True}, "group_by_length", "must be false with"),
        ({"group_by_length": 1}, "group_by_length", "true or false"),
        ({"attention": "flash_attention_2", "precision": "fp32"}, "attention", "no fp32 form"),
    ],
)
def test_what_is_illegal_names_the_field_and_says_why(
    changes: dict[str, Any], field: str, reason: str
) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        read(**changes)

    message = str(caught.value)
    assert message.startswith(f"`{field}`")
    assert "\n" not in message
    assert caught.value.exit_code == 64


def test_a_change_of_method_drops_the_quantisation() -> None:
    config = read(method="qlora").replace(method="lora")

    assert (config.quant_type, config.double_quant) == (None, None)


def test_a_change_is_checked_like_any_other() -> None:
    with pytest.raises(UsageError, match="`micro_batch`"):
        read().replace(micro_batch=0)


def test_a_step_counts_padding_and_accumulation() -> None:
    config = read(micro_batch=4, seq_len=1024, accumulation=8)

    assert config.tokens == 4096
    assert config.tokens_per_step == 32768


@pytest.mark.parametrize(
    ("checkpointing", "every"), [("off", None), ("full", 1), ("offload", 1), ("every_4", 4)]
)
def test_checkpointing_says_how_many_layers_share_one(
    checkpointing: str, every: int | None
) -> None:
    assert read(checkpointing=checkpointing).checkpoint_every == every


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        read().micro_batch = 1  # type: ignore[misc]


def test_a_single_target_may_stand_in_a_list() -> None:
    assert LoraShape.from_json({**LORA, "targets": ["q_proj"]}).targets == ("q_proj",)


def recorded() -> list[dict[str, Any]]:
    """Return the `config` of every row recorded on the H100."""
    if not RECORDED.is_file():
        pytest.skip("shared/data/h100_runs.jsonl is not beside this checkout")
    lines = RECORDED.read_text("utf-8").splitlines()
    return [json.loads(line)["config"] for line in lines]


def test_every_recorded_row_is_read_and_goes_round() -> None:
    rows = recorded()

    assert len(rows) == 86
    for row in rows:
        config = RunConfig.from_json(row)
        assert RunConfig.from_json(config.to_json()) == config
        given = {key: value for key, value in row.items() if value is not None}
        assert given.items() <= config.to_json().items()


def test_rows_of_another_engine_are_read_but_not_built() -> None:
    configs = [RunConfig.from_json(row) for row in recorded()]
    foreign = [config for config in configs if not config.is_buildable]

    assert {config.trainer for config in foreign} == {"unsloth"}
    assert len(foreign) == 4


def test_the_optimizers_are_those_of_transformers() -> None:
    from transformers.training_args import OptimizerNames

    assert set(OPTIMIZERS) == {name.value for name in OptimizerNames}
    assert len(OPTIMIZERS) == len(set(OPTIMIZERS))
