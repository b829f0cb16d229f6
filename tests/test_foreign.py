"""Files of other trainers: what is taken over, what is named, what is refused; and the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from exported import plan_of
from recorded import configure
from traced_once import save_figures, share_traces

from lora_advisor.advisor.foreign import import_file
from lora_advisor.cli import main
from lora_advisor.probes.errors import MissingInputError, UsageError
from lora_advisor.probes.plan import write_plan

AXOLOTL: dict[str, Any] = {
    "base_model": "NousResearch/Llama-3.2-1B", "adapter": "qlora", "load_in_4bit": True,
    "lora_r": 32, "lora_alpha": 16, "lora_dropout": 0.05, "lora_target_linear": True,
    "datasets": [{"path": "teknium/GPT4-LLM-Cleaned", "type": "alpaca"}], "sequence_len": 2048,
    "micro_batch_size": 2, "gradient_accumulation_steps": 4, "num_epochs": 1,
    "optimizer": "adamw_bnb_8bit", "learning_rate": 2e-4, "bf16": "auto", "tf32": False,
    "gradient_checkpointing": True, "flash_attention": True, "wandb_project": "mine",
    "warmup_ratio": 0.1, "output_dir": "./outputs/out", "weight_decay": 0.0,
    "special_tokens": {"pad_token": "<|end_of_text|>"}, "saves_per_epoch": 1,
}  # fmt: skip
FACTORY: dict[str, Any] = {
    "model_name_or_path": "Qwen/Qwen2.5-7B-Instruct", "trust_remote_code": True, "stage": "sft",
    "do_train": True, "finetuning_type": "lora", "lora_rank": 8, "lora_target": "q_proj,v_proj",
    "dataset": "identity", "template": "qwen", "cutoff_len": 1024, "max_samples": 1000,
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "learning_rate": 1e-4,
    "num_train_epochs": 3.0, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "bf16": True,
    "ddp_timeout": 180000000, "plot_loss": True, "overwrite_output_dir": True,
}  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Any:
    def write(values: object, name: str = "their.yaml") -> Path:
        path = tmp_path / name
        path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), "utf-8")
        return path

    return write


def test_an_axolotl_file_of_a_user_is_read(file: Any) -> None:
    got = import_file(file(AXOLOTL))
    config = got.config

    assert got.source == "axolotl" and got.notes == ()
    assert {"wandb_project", "warmup_ratio", "output_dir", "datasets"} <= set(got.ignored)
    assert (config.method, config.quant_type, config.double_quant) == ("qlora", "nf4", True)
    assert (config.micro_batch, config.accumulation, config.seq_len) == (2, 4, 2048)
    assert (config.precision, config.checkpointing) == ("bf16", "full")
    assert (config.attention, config.optimizer) == ("flash_attention_2", "adamw_bnb_8bit")
    assert (config.trainer, config.loss, config.kernels) == ("transformers", "full", "none")
    assert config.allocator == "expandable_segments"  # Axolotl sets it
    assert config.lora is not None and config.lora.targets == "all-linear"


def test_a_llama_factory_file_of_a_user_is_read(file: Any) -> None:
    got = import_file(file(FACTORY))
    config = got.config

    assert got.source == "llamafactory" and got.notes == ()
    assert (config.method, config.precision, config.checkpointing) == ("lora", "bf16", "full")
    assert config.lora is not None
    assert (config.lora.alpha, config.lora.targets) == (16, ("q_proj", "v_proj"))
    assert (config.seq_len, config.accumulation, config.allocator) == (1024, 8, "default")


@pytest.mark.parametrize(
    ("base", "changes", "key", "expected"),
    [
        (AXOLOTL, {"deepspeed": "zero2.json"}, "deepspeed", {}),
        (AXOLOTL, {"lora_mlp_kernel": True}, "lora_mlp_kernel", {"adapter": "peft"}),
        (AXOLOTL, {"sample_packing": True}, "sample_packing", {"packing": False}),
        (AXOLOTL, {"optimizer": "muon"}, "optimizer", {"optimizer": "adamw_torch_fused"}),
        (AXOLOTL, {"mixture_of_what": 3}, "mixture_of_what", {}),
        (AXOLOTL, {"use_pose": True}, "use_pose", {}),
        (AXOLOTL, {"peft_use_dora": True}, "peft_use_dora", {}),
        (AXOLOTL, {"attn_implementation": "flex_attention"}, "attn_implementation",
         {"attention": "sdpa"}),
        (AXOLOTL, {"plugins": ["a.Plugin"]}, "plugins", {"kernels": "none"}),
        (AXOLOTL, {"adapter": "lora", "load_in_4bit": False, "load_in_8bit": True},
         "load_in_8bit", {"method": "lora"}),
        (FACTORY, {"quantization_bit": 8}, "quantization_bit", {"method": "lora"}),
        (FACTORY, {"flash_attn": "fa3"}, "flash_attn", {"attention": "flash_attention_2"}),
        (FACTORY, {"use_unsloth": True}, "use_unsloth", {}),
        (FACTORY, {"neat_packing": True}, "neat_packing", {"packing": False}),
        (FACTORY, {"use_galore": True}, "use_galore", {}),
        (FACTORY, {"lora_ranks": 8}, "lora_ranks", {}),
        (FACTORY, {"stage": "dpo"}, "stage", {"trainer": "trl", "stage": "dpo"}),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_named_once(
    base: dict[str, Any], changes: dict[str, Any], key: str, expected: dict[str, Any], file: Any
) -> None:
    got = import_file(file({**base, **changes}))

    (note,) = got.notes
    assert note.startswith(f"`{key}`: ") and note.endswith(".")
    assert key not in got.ignored
    assert {name: getattr(got.config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("base", "changes", "expected"),
    [
        (AXOLOTL, {"adapter": None, "load_in_4bit": False}, {"method": "full", "lora": None}),
        (AXOLOTL, {"bf16": False, "fp16": True}, {"precision": "fp16"}),
        (AXOLOTL, {"bf16": False}, {"precision": "fp32", "attention": "sdpa", "flash": None}),
        (AXOLOTL, {"activation_offloading": True}, {"checkpointing": "offload"}),
        (AXOLOTL, {"gradient_checkpointing": False}, {"checkpointing": "off"}),
        (AXOLOTL, {"torch_compile": True}, {"compile": "model"}),
        (AXOLOTL, {"bnb_config_kwargs": {"bnb_4bit_use_double_quant": False}},
         {"double_quant": False}),
        (AXOLOTL, {"plugins": ["axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"]},
         {"trainer": "trl", "loss": "fused"}),
        (AXOLOTL, {"plugins": ["axolotl.integrations.liger.LigerPlugin"],
                   "liger_fused_linear_cross_entropy": True},
         {"trainer": "transformers", "loss": "fused", "kernels": "liger"}),
        (FACTORY, {"quantization_bit": 4, "quantization_type": "fp4"},
         {"method": "qlora", "quant_type": "fp4"}),
        (FACTORY, {"enable_liger_kernel": True}, {"kernels": "liger", "loss": "fused"}),
        (FACTORY, {"use_unsloth_gc": True}, {"checkpointing": "offload"}),
        (FACTORY, {"disable_gradient_checkpointing": True}, {"checkpointing": "off"}),
        (FACTORY, {"finetuning_type": "full"}, {"method": "full", "lora": None}),
        (FACTORY, {"bf16": False}, {"precision": "fp32"}),
    ],
)  # fmt: skip
def test_what_decides_memory_and_speed_is_taken_over(
    base: dict[str, Any], changes: dict[str, Any], expected: dict[str, Any], file: Any
) -> None:
    values = {**base, **changes}
    if "flash" in expected:  # flash attention has no fp32 form
        values["flash_attention"] = expected.pop("flash")
    got = import_file(file(values))

    assert got.notes == ()
    assert {name: getattr(got.config, name) for name in expected} == expected


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("base_model: [", "must be YAML, but cannot be read (line"),
        ("- a\n- b\n", "must hold keys with values"),
        ("", "must hold keys with values"),
        ("a: &x [*x]\n", "none of their keys"),
        ({"learning_rate": 1}, "none of their keys"),
        ({**AXOLOTL, "micro_batch_size": "two"}, "`micro_batch_size` must be a whole number"),
        ({**AXOLOTL, "micro_batch_size": 0}, "`micro_batch` must be a whole number"),
        ({**AXOLOTL, "base_model": None}, "`base_model` must be a text, but it is not there"),
        ({**AXOLOTL, "adapter": "mixlora"}, "`adapter` must be lora, qlora"),
        ({**AXOLOTL, "rl": "grpo"}, "`rl` must be dpo"),
        ({**AXOLOTL, "bnb_config_kwargs": 4}, "`bnb_config_kwargs` must be a mapping"),
        ({**FACTORY, "stage": "ppo"}, "`stage` must be sft, pt or dpo"),
        ({**FACTORY, "finetuning_type": "freeze"}, "`finetuning_type` must be lora or full"),
        ({**FACTORY, "bf16": "perhaps"}, "`bf16` must be true or false"),
        ({**FACTORY, "optim": "made_up"}, "`optimizer` must be one of"),
        ({"compute_environment": "LOCAL_MACHINE"}, "give with --onto"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_sentence(
    content: object, said: str, file: Any
) -> None:
    with pytest.raises(UsageError) as refused:
        import_file(file(content))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_scripts_of_others_are_not_read_and_nothing_of_ours_is_run(
    file: Any, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="must be a script that lora-advisor exported"):
        import_file(file("print(1)\n", "train.py"))
    with pytest.raises(UsageError, match="exported for trl"):
        import_file(file("print(1)\n", "train.py"), "trl")
    mark = '# lora-advisor: {"target": "trl"}\n'
    for text, said in (
        ("def (:\n", "must be a Python script"),
        (f"open({str(tmp_path / 'ran')!r}, 'w')\n", "must call one of SFTConfig"),
        ("SFTConfig(max_length=3)\n", "must give MODEL a value"),
        ("MODEL='m'\nSFTConfig(max_length=n)\n", "must be a whole number, but got the code `n`"),
    ):
        with pytest.raises(UsageError) as refused:
            import_file(file(mark + text, "train.py"))
        assert said in str(refused.value)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UsageError, match="must be one of"):
        import_file(file(AXOLOTL), "keras")
    with pytest.raises(MissingInputError):
        import_file(tmp_path / "none.yaml")


# The commands ------------------------------------------------------------------------------------


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    write_plan(path, plan_of(configure(checkpointing="every_2")))
    return path


def refused(capsys: pytest.CaptureFixture[str], words: list[object], code: int, said: str) -> None:
    assert main([str(word) for word in words]) == code
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and lines[-1].startswith("Error: ") and said in lines[-1]
    assert "Traceback" not in err and "itself" not in err


def test_bad_words_end_with_one_sentence_and_64(
    plan_file: Path, file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, code, said in (
        (["export", plan_file, "--to", "keras"], 64, "must be one of trl"),
        (["export", plan_file, "--to", "trl==0.1"], 64, "version 1.16 alone"),
        (["export", file("{}", "no.json"), "--to", "trl"], 64, "no field `chosen`"),
        (["export", file("x: [", "not.json"), "--to", "trl"], 64, "cannot be read"),
        (["export", tmp_path / "none.json", "--to", "trl"], 66, "is not there"),
        (["export", plan_file, "--to", "trl", "--out", plan_file], 73, "earlier export"),
        (["export", plan_file, "--to", "trl", "--out", plan_file / "x"], 73, "can be written"),
        (["import", file("a: [", "bad.yaml")], 64, "must be YAML"),
        (["import", tmp_path / "none.yaml"], 66, "is not there"),
        (["import", tmp_path], 64, "cannot be read"),
        (["fit", "--config", file("a: [", "bad.yaml"), "--gpu", "rtx-4060"], 64, "must be YAML"),
    ):
        refused(capsys, words, code, said)
    assert "chosen" in plan_file.read_text()


def test_export_and_import_on_the_command_line(
    plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "axolotl.yaml"
    words = ["export", str(plan_file), "--to", "axolotl", "--no-cost"]
    assert main([*words, "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert said.out == "" and "checkpoints every layer" in said.err
    assert f"axolotl train {out}" in said.err
    assert main(words) == 0
    assert capsys.readouterr().out == out.read_text()
    assert main([*words, "--out", str(out)]) == 0  # an export may be made anew
    capsys.readouterr()

    assert main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["text"] == out.read_text() and document["config"]["checkpointing"] == "full"
    assert main(["import", str(out)]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == document["config"]
    assert "other keys decide neither memory nor speed" in said.err
    config = tmp_path / "config.json"
    assert main(["import", str(out), "--json", "--out", str(config)]) == 0
    assert json.loads(capsys.readouterr().out)["config"] == json.loads(config.read_text())


def test_an_accelerate_file_is_laid_over_a_plan(
    plan_file: Path, file: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = file({"distributed_type": "MULTI_GPU", "num_processes": 2, "mixed_precision": "fp16"})

    assert main(["import", str(theirs), "--onto", str(plan_file)]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["precision"] == "fp16"
    assert "one process on one device" in said.err


@pytest.mark.parametrize(("vram", "code"), [(8.0, 0), (0.4, 1)])
def test_will_their_file_fit(
    vram: float,
    code: int,
    file: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    share_traces(monkeypatch)
    monkeypatch.setenv("LORA_ADVISOR_CACHE", str(tmp_path / "cache"))
    theirs = file({**AXOLOTL, "base_model": save_figures(tmp_path / "m"), "deepspeed": "z.json"})
    words = ["fit", "--config", str(theirs), "--gpu", "rtx-4060", "--vram", str(vram)]

    assert main([*words, "--no-largest"]) == code
    said = capsys.readouterr()
    assert said.out.startswith("yes" if code == 0 else "no")
    assert "`deepspeed`: " in said.err


@pytest.mark.parametrize("base", [AXOLOTL, FACTORY])
def test_no_value_of_a_wrong_kind_is_an_error_of_ours(base: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "their.yaml"
    more = ("plugins", "rl", "batch_size", "torch_compile", "flash_attn", "quantization_bit",
            "bnb_config_kwargs", "lora_target_modules", "attn_implementation", "optim",
            "activation_offloading", "train_sampling_strategy", "quantization_method")  # fmt: skip
    for key in (*base, *more):
        for value in ([], {}, [{"a": 1}], {"b": [2]}, 3.5, -1, "x", "", True, False, None, 10**30):
            path.write_text(yaml.safe_dump({**base, key: value}), "utf-8")
            try:
                import_file(path)
            except UsageError as error:
                assert "\n" not in str(error)
