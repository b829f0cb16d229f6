"""Exports: whole files for other trainers, which read back as what those trainers will run."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from exported import AWKWARD, drawn, plan_of, recipe
from foretold import candidate, ended
from recorded import configure
from traced_once import share_traces

from lora_advisor.advisor.export import (
    TARGETS,
    Exported,
    export_config,
    export_plan,
    find_target,
    launch,
)
from lora_advisor.advisor.export_cost import Prices, open_prices
from lora_advisor.advisor.export_words import Recipe, literal, settle
from lora_advisor.advisor.foreign import import_file
from lora_advisor.advisor.foreign_keys import foreign_keys
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import UsageError
from lora_advisor.probes.machine import GIB
from lora_advisor.probes.plan import Candidate

WRITTEN = [name for name in TARGETS if name != "accelerate"]


def exported(config: RunConfig, name: str, made: Recipe | None = None) -> Exported | None:
    """Return an export; None where the target refuses the stage."""
    try:
        return export_config(config, made or recipe(), find_target(name))
    except UsageError as error:
        assert "does not go with this plan" in str(error) and config.stage == "dpo"
        return None


def back(made: Exported, folder: Path, onto: RunConfig | None = None) -> RunConfig:
    file = folder / f"export{made.target.suffix}"
    file.write_text(made.text, "utf-8")
    got = import_file(file, onto=onto)
    assert got.source == made.target.name
    assert not [n for n in got.notes if "no such key" in n or "not modelled" in n], got.notes
    return got.config


# There and back ----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_exported_reads_back_as_what_will_run(
    name: str, device: str, tmp_path: Path
) -> None:
    whole = 0
    for config in drawn(40, seed=20261125):
        if device == "cpu":  # there is no fp16 there, nor an allocator to set
            config = config.replace(
                precision="fp32" if config.precision == "fp16" else config.precision,
                attention="sdpa",
                allocator="default",
                quant_type=config.quant_type,
                double_quant=config.double_quant,
            )
        made = exported(config, name, recipe(device=device))
        if made is None:
            continue
        assert back(made, tmp_path) == made.config
        if not made.lost:
            assert made.config == config
            whole += 1
        else:
            assert made.config != config
    assert whole or name in ("llamafactory", "transformers", "unsloth")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("trl", {"compile": "layers", "checkpointing": "every_2", "method": "qlora"}),
        ("trl", {"packing": True, "allocator": "expandable_segments", "fp32_upcast": True}),
        ("trl", {"adapter": "fused", "precision": "fp16", "group_by_length": True}),
        ("trl", {"stage": "dpo", "kernels": "liger"}),
        ("transformers", {"trainer": "transformers", "loss": "full", "compile": "model"}),
        ("transformers", {"trainer": "transformers", "kernels": "liger", "method": "qlora"}),
        ("axolotl", {"compile": "layers", "checkpointing": "off", "packing": True}),
        ("axolotl", {"trainer": "transformers", "kernels": "liger", "method": "qlora"}),
        ("llamafactory", {"trainer": "transformers", "loss": "full", "method": "qlora"}),
        ("llamafactory", {"trainer": "transformers", "kernels": "liger", "precision": "fp16"}),
        ("unsloth", {"method": "qlora", "checkpointing": "offload", "packing": True}),
    ],
)
def test_what_a_target_can_express_is_not_changed(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    config = configure(**changes)
    made = exported(config, name)

    assert made is not None and made.lost == () and made.config == config
    assert back(made, tmp_path) == config


def test_accelerate_carries_precision_and_compiling(tmp_path: Path) -> None:
    for config in drawn(30, seed=7):
        made = exported(config, "accelerate")
        assert made is not None
        other = config.replace(
            precision="bf16", compile="off", quant_type=config.quant_type,
            double_quant=config.double_quant,
        )  # fmt: skip
        assert back(made, tmp_path, onto=other) == config


@pytest.mark.parametrize("name", TARGETS)
def test_a_bundled_name_is_exported_as_its_hub_id_and_read_back(name: str, tmp_path: Path) -> None:
    trainer = {"trainer": "transformers", "loss": "full"} if name == "transformers" else {}
    plan = plan_of(configure(model="qwen2.5-1.5b", **trainer))
    made = export_plan(plan, find_target(name))

    assert back(made, tmp_path, onto=made.config).model == "qwen2.5-1.5b"
    if name != "accelerate":
        assert "Qwen/Qwen2.5-1.5B" in made.text


def test_a_model_that_was_changed_since_is_the_one_that_is_read(tmp_path: Path) -> None:
    made = export_plan(plan_of(configure(model="qwen2.5-1.5b")), find_target("trl"))
    file = tmp_path / "train.py"
    text = made.text.replace('MODEL = "Qwen/Qwen2.5-1.5B"', 'MODEL = "other/model"')
    text = text.replace("per_device_train_batch_size=2", "per_device_train_batch_size=5")
    file.write_text(text)

    got = import_file(file).config
    assert (got.model, got.micro_batch) == ("other/model", 5)


# What is in the file -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", TARGETS)
def test_awkward_names_stay_what_they_are(name: str, tmp_path: Path) -> None:
    config = configure(model=AWKWARD)
    made = exported(config, name, recipe(model=AWKWARD, data=AWKWARD, shape="instruction"))

    assert made is not None
    if made.target.suffix == ".py":
        tree = ast.parse(made.text)
        constants = {
            ast.unparse(node.targets[0]): ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        }
        assert constants["MODEL"] == constants["DATA"] == AWKWARD
    else:
        values = yaml.safe_load(made.text)
        assert isinstance(values, dict)
        if name != "accelerate":
            assert AWKWARD in values.values()
    assert back(made, tmp_path, onto=made.config).model == AWKWARD


@pytest.mark.parametrize("value", [AWKWARD, "plain", 'say "x"', "tab\t", "", {"a": ["'", None]}])
def test_a_literal_is_what_it_was(value: Any) -> None:
    assert ast.literal_eval(literal(value)) == value


@pytest.mark.parametrize("name", ["axolotl", "llamafactory"])
def test_every_key_is_one_of_the_released_package(name: str) -> None:
    known = set(foreign_keys()[name]["keys"])
    for config in drawn(30, seed=3):
        made = exported(config, name)
        assert made is not None
        assert set(yaml.safe_load(made.text)) <= known


def test_unsloth_is_called_with_arguments_it_has() -> None:
    keys = foreign_keys()["unsloth"]
    for config in drawn(30, seed=4):
        made = exported(config, "unsloth")
        if made is None:
            continue
        for node in ast.walk(ast.parse(made.text)):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func).rsplit(".", 1)[-1]
                if called in keys:
                    assert {word.arg for word in node.keywords} <= set(keys[called])


@pytest.mark.parametrize("name", TARGETS)
def test_the_header_names_versions_and_what_is_lost(name: str) -> None:
    target = find_target(name)
    config = configure(checkpointing="every_3", compile="layers", packing=True)
    made = exported(config, name)

    assert made is not None
    head = "\n".join(line for line in made.text.splitlines() if line.startswith("#"))
    for package, version in target.versions.items():
        assert f"{package} {version}" in head
    assert "The plan's stack: torch " in head
    for item in made.lost:
        assert item.why in head
    for note in made.notes:
        assert note in head


def test_llama_factory_is_told_to_pack_though_our_words_have_no_packing_there() -> None:
    made = exported(configure(packing=True), "llamafactory")

    assert made is not None and yaml.safe_load(made.text)["neat_packing"] is True


@pytest.mark.parametrize(
    ("name", "allocator", "setting"),
    [
        ("axolotl", "default", "PYTORCH_ALLOC_CONF=expandable_segments:False axolotl"),
        ("axolotl", "expandable_segments", "axolotl"),
        ("llamafactory", "default", "llamafactory-cli"),
        ("llamafactory", "expandable_segments", "PYTORCH_ALLOC_CONF=expandable_segments:True l"),
    ],
)
def test_the_command_sets_the_allocator(name: str, allocator: str, setting: str) -> None:
    command = launch(configure(allocator=allocator), recipe(), find_target(name))

    assert command.startswith(setting)


def test_a_plan_for_several_cards_says_how_it_is_started() -> None:
    made = exported(configure(), "trl", recipe(gpus=2))
    several = exported(configure(), "accelerate", recipe(gpus=2))

    assert made is not None and "accelerate launch --num_processes 2" in made.text
    assert several is not None
    values = yaml.safe_load(several.text)
    assert (values["distributed_type"], values["num_processes"]) == ("MULTI_GPU", 2)


# What it costs -----------------------------------------------------------------------------------


def test_what_was_measured_prices_what_is_lost() -> None:
    rules = find_target("llamafactory").rules(recipe())
    config = configure(trainer="transformers", loss="full", compile="layers")
    run, _ = settle(config, rules)
    measured = [
        Candidate(
            config=c,
            prediction=candidate(1.0).prediction,
            measured=ended(c, step_times_s=(s,) * 3, tokens_per_step=1000, process_bytes=b * GIB),
        )
        for c, s, b in ((config, 1.0, 6), (run, 2.0, 5))
    ]
    plan = plan_of(config, chosen=measured[0], runners_up=(measured[1],))

    made = export_plan(plan, find_target("llamafactory"), prices=Prices(plan, None))

    assert made.lost[0].cost == "Effect: 1.00 GiB less, 50% slower (measured for the plan)."


def test_what_was_not_measured_is_priced_by_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    share_traces(monkeypatch)
    config = configure(
        micro_batch=16, seq_len=512, checkpointing="every_2", trainer="transformers", loss="full"
    )
    plan = plan_of(config)
    prices = open_prices(plan, None)

    made = export_plan(plan, find_target("llamafactory"), prices=prices)

    (lost,) = made.lost
    assert lost.cost is not None and "GiB less" in lost.cost and "slower (traced)" in lost.cost
    assert lost.cost in made.text
    compiled = prices.between(config.replace(compile="layers"), config)
    assert compiled is not None and "can only be measured" in compiled


# The commands ------------------------------------------------------------------------------------


def test_a_target_that_is_none_is_refused() -> None:
    for name, said in (("keras", "must be one of trl"), ("axolotl==0.1", "version 0.21.0 alone")):
        with pytest.raises(UsageError, match=said):
            find_target(name)
    assert find_target("axolotl==0.21.0").name == "axolotl"


def test_the_recorded_keys_are_named_with_their_versions() -> None:
    for name in ("axolotl", "llamafactory", "unsloth"):
        assert foreign_keys()[name]["version"] in (find_target(name).versions[name],)
    assert json.dumps(foreign_keys())
