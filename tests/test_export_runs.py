"""Exports under the installed libraries: their objects are made, and their scripts train."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from exported import plan_of, recipe
from recorded import configure
from tiny_model import save_model, save_rows

from lora_advisor.advisor.export import export_config, export_plan, find_target
from lora_advisor.probes.architectures import resolve_architecture
from lora_advisor.probes.config import LoraShape, RunConfig
from lora_advisor.probes.machine import cpu_machine

#: peft and trl under the newest transformers, where they mention themselves what will go.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("it's a") / 'model "x"'
    save_model(folder)
    save_rows(folder / "rows.jsonl", 12)
    return folder


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


def load(text: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "exported"}
    exec(compile(text, "exported.py", "exec"), names)
    return names


def on_cpu(text: str) -> str:
    """Let an export for a card make its objects on a machine without one."""
    assert "use_cpu=False" in text
    return text.replace("use_cpu=False", "use_cpu=True")


def config_for(model: Path, **changes: Any) -> RunConfig:
    shape = LoraShape(r=4, alpha=8, dropout=0.0, targets="all-linear")
    values = {"model": str(model), "precision": "fp32", "seq_len": 96, "lora": shape, **changes}
    return configure(**values)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("trl", {"method": "qlora", "checkpointing": "every_2", "packing": True}),
        ("trl", {"precision": "fp16", "optimizer": "paged_adamw_8bit", "compile": "layers"}),
        ("trl", {"stage": "dpo", "checkpointing": "off"}),
        ("transformers", {"trainer": "transformers", "loss": "full", "checkpointing": "offload"}),
        ("transformers", {"method": "qlora", "quant_type": "fp4", "double_quant": False}),
        ("transformers", {"trainer": "transformers", "kernels": "liger", "compile": "model"}),
    ],
)
def test_the_libraries_make_the_objects_of_a_script(name: str, changes: dict[str, Any]) -> None:
    config = configure(**changes)
    made = export_config(config, recipe(), find_target(name))
    names = load(on_cpu(made.text.replace("fp16=True", "fp16=False")))

    arguments, lora = names["make_arguments"](), names["make_lora"]()
    run = made.config
    assert type(arguments).__name__ == (
        "TrainingArguments" if name == "transformers"
        else "DPOConfig" if config.stage == "dpo" else "SFTConfig"
    )  # fmt: skip
    assert arguments.per_device_train_batch_size == run.micro_batch
    assert arguments.gradient_accumulation_steps == run.accumulation
    assert arguments.optim == run.optimizer
    assert arguments.activation_checkpointing == (run.checkpoint_every is not None)
    assert arguments.use_liger_kernel == (run.kernels == "liger")
    assert (lora.r, lora.lora_alpha) == (8, 16)
    if name == "trl":
        assert arguments.max_length == run.seq_len
    if run.method == "qlora":
        quantised = names["make_quantization"]()
        assert quantised.bnb_4bit_quant_type == run.quant_type
        assert quantised.bnb_4bit_use_double_quant == run.double_quant
        assert str(quantised.bnb_4bit_compute_dtype) == "torch.bfloat16"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("trl", {"checkpointing": "every_2"}),
        ("transformers", {"trainer": "transformers", "loss": "full", "fp32_upcast": True}),
    ],
)
def test_an_exported_script_trains(
    name: str, changes: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    config = config_for(model, **changes)
    plan = plan_of(
        config,
        data=model / "rows.jsonl",
        machine=cpu_machine(),
        architecture=resolve_architecture(str(model)),
    )
    made = export_plan(plan, find_target(name))
    assert made.lost == ()

    load(made.text)["main"]()

    assert (tmp_path / "outputs" / "adapter_model.safetensors").exists()
    import json

    from peft import LoraConfig

    saved = json.loads((tmp_path / "outputs" / "adapter_config.json").read_text())
    assert LoraConfig(**{"r": saved["r"], "lora_alpha": saved["lora_alpha"]}).r == 4


@pytest.mark.parametrize("shape", ["messages", "ShareGPT", "instruction", "text"])
def test_rows_of_each_shape_become_rows_that_are_known(
    shape: str, model: Path, tmp_path: Path
) -> None:
    import json

    from datasets import load_dataset
    from transformers import AutoTokenizer

    every: dict[str, dict[str, Any]] = {
        "messages": {"messages": [{"role": "user", "content": "a"},
                                  {"role": "assistant", "content": "b"}]},
        "ShareGPT": {"conversations": [{"from": "human", "value": "a"},
                                       {"from": "gpt", "value": "b"}]},
        "instruction": {"instruction": "a", "input": "more", "output": "b"},
        "text": {"text": "a b"},
    }  # fmt: skip
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(every[shape]) + "\n")
    config = config_for(model, trainer="transformers", loss="full")
    made = export_config(
        config,
        dataclasses.replace(recipe(model=str(model), data=str(data), shape=shape), device="cpu"),
        find_target("transformers"),
    )
    names = load(made.text)
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    rows = load_dataset("json", data_files=str(data), split="train")
    if "as_pair" in names:
        rows = rows.map(
            names["as_pair"], fn_kwargs={"chat": True}, remove_columns=rows.column_names
        )
    if "as_messages" in names:
        rows = rows.map(names["as_messages"], remove_columns=rows.column_names)
    tokens = names["tokens_of"](rows[0], tokenizer)

    text = tokenizer.decode(tokens["input_ids"])
    assert "a" in text and "b" in text
    assert len(tokens["labels"]) == len(tokens["input_ids"])
    trained = tokenizer.decode([t for t in tokens["labels"] if t != -100])
    assert "b" in trained
    if shape == "instruction":
        assert "more" in text and "more" not in trained


def test_accelerate_parses_its_file(tmp_path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    for precision, compile_ in (("bf16", "layers"), ("fp16", "off"), ("fp32", "model")):
        config = configure(precision=precision, compile=compile_)
        made = export_config(config, recipe(), find_target("accelerate"))
        file = tmp_path / "accelerate.yaml"
        file.write_text(made.text)

        read = load_config_from_file(str(file))
        assert read.mixed_precision == {"fp32": "no"}.get(precision, precision)
        assert str(read.distributed_type).endswith("NO") and read.num_processes == 1
        assert bool(read.dynamo_config) == (compile_ != "off")
        if compile_ != "off":
            _same_as_its_plugin(read.dynamo_config, compile_)


def _same_as_its_plugin(read: dict[str, Any], compile_: str) -> None:
    from accelerate.utils import TorchDynamoPlugin

    words = {key.removeprefix("dynamo_"): value for key, value in read.items()}
    words["dynamic"] = words.pop("use_dynamic")
    words["fullgraph"] = words.pop("use_fullgraph")
    plugin = TorchDynamoPlugin(**words)
    assert plugin.use_regional_compilation == (compile_ == "layers")
