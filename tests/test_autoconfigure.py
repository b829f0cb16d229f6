"""`autoconfigure` hands out objects that train as planned, and says what came beside it."""

from __future__ import annotations

import dataclasses
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from exported import plan_of
from recorded import configure, tiny
from tiny_model import save_model, save_rows

from lora_advisor.advisor import autoconfigure
from lora_advisor.advisor.configuring import plan_words, setup_of
from lora_advisor.cli import group
from lora_advisor.probes.architectures import resolve_architecture
from lora_advisor.probes.config import LoraShape, RunConfig
from lora_advisor.probes.errors import StackError, UnavailableError, UsageError
from lora_advisor.probes.machine import cpu_machine
from lora_advisor.probes.plan import Plan, write_plan

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "model"
    save_model(folder)
    save_rows(folder / "rows.jsonl", 24)
    return folder


def config_for(model: Path, **changes: Any) -> RunConfig:
    shape = LoraShape(r=4, alpha=8, dropout=0.0, targets="all-linear")
    values = {"model": str(model), "precision": "fp32", "seq_len": 96, "lora": shape, **changes}
    return configure(**values)


def here(config: RunConfig, model: Path) -> Plan:
    architecture = resolve_architecture(str(model))
    return plan_of(config, machine=cpu_machine(), architecture=architecture)


def rows(model: Path, tokenizer: Any) -> Any:
    from datasets import Dataset

    texts = [line for line in (model / "rows.jsonl").read_text().splitlines()]
    return Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"][:96] for text in texts]})


# Before anything is made -------------------------------------------------------------------------


def test_the_package_is_imported_at_once() -> None:
    code = (
        "import sys, lora_advisor.advisor; from lora_advisor.advisor import autoconfigure; "
        "print([name for name in ('torch', 'transformers', 'numpy', 'optuna', 'yaml') "
        "if name in sys.modules])"
    )
    child = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)

    assert child.stdout.strip() == "[]"


def test_its_words_and_defaults_are_those_of_the_command_line() -> None:
    asked = group.commands["plan"].make_context("plan", []).params
    for name in ("as_json", "out"):
        asked.pop(name)

    assert plan_words({}) == asked


def test_words_that_are_none_are_refused(model: Path) -> None:
    with pytest.raises(UsageError, match="but got 'vrams'"):
        autoconfigure("qwen2.5-1.5b", vrams=8)
    plan = here(config_for(model), model)
    with pytest.raises(UsageError, match="so model, vram must be left out"):
        autoconfigure("qwen2.5-1.5b", plan=plan, vram=8)


def test_a_plan_of_another_stack_is_refused(model: Path, tmp_path: Path) -> None:
    plan = here(config_for(model), model)
    other = dataclasses.replace(plan, stack=dataclasses.replace(plan.stack, torch="1.0"))
    file = tmp_path / "plan.json"
    write_plan(file, other)

    with pytest.raises(StackError, match="another stack"):
        autoconfigure(plan=file)
    assert autoconfigure(plan=file, ignore_stack=True).config == plan.chosen.config


# The objects -------------------------------------------------------------------------------------


def test_the_objects_say_what_the_plan_says(model: Path) -> None:
    config = config_for(
        model, method="qlora", quant_type="fp4", double_quant=False, micro_batch=3,
        accumulation=5, checkpointing="every_2", optimizer="adafactor",
    )  # fmt: skip
    setup = setup_of(here(config, model), output_dir="there")

    arguments = setup.training_arguments
    assert type(arguments).__name__ == "SFTConfig"
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (3, 5)
    assert (arguments.max_length, arguments.optim, arguments.output_dir) == (
        96, "adafactor", "there",
    )  # fmt: skip
    assert arguments.activation_checkpointing_kwargs["every_n_layers"] == 2
    assert setup.quantization.bnb_4bit_quant_type == "fp4"
    assert setup.model_arguments["quantization_config"] is setup.quantization
    assert str(setup.model_arguments["dtype"]) == "torch.float32"
    assert (setup.lora.r, setup.lora.lora_alpha) == (4, 8)
    assert setup.model_name == str(model.resolve())


def test_what_the_objects_cannot_carry_is_said(model: Path) -> None:
    plain = setup_of(here(config_for(model), model))
    compiled = setup_of(here(config_for(model, compile="layers"), model))

    assert plain.notes == ()
    assert "setup.prepare(model)" in " ".join(compiled.notes)
    full = setup_of(here(config_for(model, method="full", lora=None), model))
    assert (full.lora, full.quantization) == (None, None)


def test_objects_for_a_card_that_is_not_here_are_refused_in_words() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a card here")
    plan = plan_of(configure(), architecture=tiny())

    with pytest.raises(UnavailableError, match="lora-advisor export"):
        setup_of(plan)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's compiler itself
def test_layers_are_compiled_by_prepare(model: Path) -> None:
    from transformers import AutoModelForCausalLM

    setup = setup_of(here(config_for(model, compile="layers"), model))
    loaded = AutoModelForCausalLM.from_pretrained(setup.model_name, **setup.model_arguments)

    prepared = setup.prepare(loaded)
    layers = prepared.get_decoder().layers
    assert all(layer._compiled_call_impl is not None for layer in layers)
    assert not prepared.config.use_cache


# Training with them ------------------------------------------------------------------------------


@pytest.mark.parametrize("trainer", ["trl", "transformers"])
def test_a_trainer_runs_with_them_and_is_told_what_came(
    trainer: str, model: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loss = {"trainer": "transformers", "loss": "full"} if trainer == "transformers" else {}
    setup = setup_of(here(config_for(model, **loss), model), output_dir=str(tmp_path / "out"))
    tokenizer = AutoTokenizer.from_pretrained(setup.model_name)
    loaded = AutoModelForCausalLM.from_pretrained(setup.model_name, **setup.model_arguments)
    said: list[str] = []
    told = setup.callback(after=4, say=said.append)
    data = rows(model, tokenizer)
    common = {
        "model": setup.prepare(loaded), "args": setup.training_arguments, "train_dataset": data,
        "processing_class": tokenizer, "callbacks": [told],
    }  # fmt: skip
    run: Any
    if trainer == "trl":
        from trl import SFTTrainer

        run = SFTTrainer(**common, peft_config=setup.lora)
    else:
        from transformers import DataCollatorForLanguageModeling, Trainer

        run = Trainer(**common, data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False))
    run.train()

    assert [re.findall(r"step (\d+) of (\d+)", line) for line in said] == [
        [("4", "12")], [("12", "12")],
    ]  # fmt: skip
    reached = told.reached
    assert reached is not None and reached.tokens_per_s is not None and reached.tokens_per_s > 0
    # Two rows a batch, padded to the longer one.
    lengths = [len(ids) for ids in data["input_ids"]]
    assert reached.filled is not None
    assert min(lengths) / 96 <= reached.filled <= max(lengths) / 96
    assert reached.peak_bytes is not None and reached.peak_bytes > 2**20
    assert "1,000 predicted, 1,000 to 1,000" in said[-1] and "GiB predicted, traced" in said[-1]
    assert f"rows fill {reached.filled:.0%} of 96 tokens" in said[-1]
    assert not run.model._forward_pre_hooks
    trained = {n for n, p in run.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)


def test_it_plans_by_itself(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of the documents, for a card that is not here: only the objects are refused."""
    import lora_advisor.advisor.configuring as module

    monkeypatch.setenv("LORA_ADVISOR_CACHE", str(tmp_path / "cache"))
    made: list[Plan] = []

    def keep(plan: Plan, output_dir: str) -> str:
        made.append(plan)
        return output_dir

    monkeypatch.setattr(module, "setup_of", keep)
    quick: dict[str, Any] = {
        "method": "lora", "checkpointing": "full", "kernels": "none", "compile": "off",
        "optimizer": "adamw_torch_fused", "allocator": "default", "micro_batch": 2,
    }  # fmt: skip

    autoconfigure(str(model), vram=8, gpu="rtx-4060", seq=64, batch=4, trials=1, **quick)

    (plan,) = made
    assert (plan.chosen.config.micro_batch, plan.chosen.config.accumulation) == (2, 2)
    assert plan.spec.gpu == "rtx-4060"


@pytest.mark.parametrize("name", ["sft_with_trl", "sft_with_transformers"])
def test_the_examples_run(
    name: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f'{{"text": "row {n} of some"}}\n' for n in range(12)))
    plain = {"trainer": "transformers", "loss": "full"} if "transformers" in name else {}
    write_plan(tmp_path / "plan.json", here(config_for(model, **plain), model))

    example = runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="example")
    example["main"]("plan.json", str(data))

    assert (tmp_path / "outputs" / "adapter_model.safetensors").exists()
    assert "lora-advisor, step 6 of 6: tokens/s " in capsys.readouterr().out
