from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_model
from tiny_training import config_of, run

from lora_advisor import cli
from lora_advisor.advisor.merge import TOLERANCE, merge
from lora_advisor.advisor.merge_plan import check_room, plan_merge
from lora_advisor.advisor.stored_weights import stored_weights
from lora_advisor.probes.errors import (
    AdvisorError,
    DataError,
    MissingInputError,
    OutputError,
    UnavailableError,
    UsageError,
)

pytestmark = [
    # peft 0.21 asks transformers 5.23 by names that transformers calls deprecated.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a LoRA training."""
    folder = tmp_path_factory.mktemp("lora")
    run(config_of(tiny), tiny / "rows.jsonl", folder)
    return folder


def save_adapter(base: Path, folder: Path, **changes: Any) -> Path:
    """Save an adapter of peft's with random weights, some other than what is trained here."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    values = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(**{**values, **changes}),
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data.normal_(0.0, 0.05)
    model.save_pretrained(str(folder))
    return folder


def logits_of(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model.eval()(torch.arange(3, 51).reshape(2, 24)).logits.float()


def base_with(base: Path, adapter: Path) -> Any:
    """Return what a user gets with peft alone."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter))


def full(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize(("dtype", "bytes_each", "close"), [(None, 2, 0.05), ("fp32", 4, 1e-5)])
def test_the_merged_model_says_what_base_and_adapter_say(
    tmp_path: Path,
    tiny: Path,
    trained: Path,
    capsys: pytest.CaptureFixture[str],
    dtype: str | None,
    bytes_each: int,
    close: float,
) -> None:
    import torch
    from transformers import AutoTokenizer

    output = tmp_path / "merged"
    words = ["--dtype", dtype] if dtype else []
    assert cli.main(["merge", str(trained), "--output", str(output), *words, "--json"]) == 0
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert "of memory and" in said.err and "are free" in said.err
    expected = logits_of(base_with(tiny, trained / "adapter"))
    torch.testing.assert_close(logits_of(full(output)), expected, rtol=0, atol=close)
    assert (logits_of(full(tiny)) - expected).abs().max() > 10 * close  # the adapter does something
    assert told["changed"] == 14 and told["quantised"] is None
    assert told["check"]["relative"] < TOLERANCE[told["dtype"]] < told["effect"]["relative"]
    numbers = sum(p.numel() for p in full(tiny).parameters())
    assert stored_weights(output).bytes == numbers * bytes_each
    assert (
        json.loads((output / "config.json").read_text())["dtype"]
        == ({2: "bfloat16", 4: "float32"}[bytes_each])
    )
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.chat_template == tiny_model.CHAT_TEMPLATE
    assert [entry.name for entry in tmp_path.iterdir()] == ["merged"]


def test_a_model_in_several_files_is_merged_into_several_files(
    tmp_path: Path, tiny: Path, trained: Path
) -> None:
    import torch

    base = tmp_path / "base"
    full(tiny).save_pretrained(str(base), max_shard_size="100KB")
    assert len(list(base.glob("*.safetensors"))) > 1
    made = merge(
        plan_merge(trained, base=str(base), dtype="fp32", shard_bytes=60_000), tmp_path / "merged"
    )
    files = list(made.output.glob("*.safetensors"))
    assert len(files) > len(list(base.glob("*.safetensors")))
    assert max(file.stat().st_size for file in files) < 75_000  # its largest weight has 66 kB
    merged = base_with(tiny, trained / "adapter").merge_and_unload()
    torch.testing.assert_close(
        full(made.output).state_dict(), merged.state_dict(), rtol=0, atol=1e-6
    )


def test_an_adapter_of_a_quantised_base_goes_into_the_unquantised_one_and_what_differs_is_measured(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    run(config_of(tiny, method="qlora"), tiny / "rows.jsonl", tmp_path / "run", max_steps=2)
    output = tmp_path / "merged"
    assert cli.main(["merge", str(tmp_path / "run"), "--output", str(output)]) == 0
    text = capsys.readouterr().out
    assert "against the adapter on the 4-bit base it was trained on" in text
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    expected = logits_of(base_with(tiny, tmp_path / "run" / "adapter"))
    torch.testing.assert_close(logits_of(full(output)), expected, rtol=0, atol=0.05)
    again = merge(plan_merge(tmp_path / "run", dtype="fp32"), tmp_path / "fp32")
    assert again.quantised is not None
    assert again.check.relative < 1e-4 < 0.02 < again.quantised.relative < 1  # of 4 bits


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"rank_pattern": {"q_proj": 2}}])
def test_adapters_of_other_forms_are_merged_by_peft(
    tmp_path: Path, tiny: Path, changes: dict[str, Any]
) -> None:
    import torch

    adapter = save_adapter(tiny, tmp_path / "adapter", **changes)
    made = merge(plan_merge(adapter, dtype="fp32"), tmp_path / "merged")
    assert made.changed is None
    expected = logits_of(base_with(tiny, adapter))
    torch.testing.assert_close(logits_of(full(made.output)), expected, rtol=0, atol=1e-4)
    assert (logits_of(full(tiny)) - expected).abs().max() > 0.01


@pytest.mark.parametrize("bare", [False, True], ids=["transposed", "files-name-weights-otherwise"])
def test_a_gpt2_is_merged_whose_weights_are_transposed(tmp_path: Path, bare: bool) -> None:
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = tmp_path / "base"
    GPT2LMHeadModel(
        GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=2, n_positions=64,
                   bos_token_id=1, eos_token_id=2)
    ).save_pretrained(str(base))  # fmt: skip
    tiny_model.save_tokenizer(base)
    if bare:  # as on the hub: without the prefix that the modules have
        weights = load_file(base / "model.safetensors")
        weights = {name.removeprefix("transformer."): value for name, value in weights.items()}
        save_file(weights, base / "model.safetensors", {"format": "pt"})
    adapter = save_adapter(
        base, tmp_path / "adapter", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True
    )
    made = merge(plan_merge(adapter, dtype="fp32"), tmp_path / "merged")
    assert made.changed == (None if bare else 4)
    expected = logits_of(base_with(base, adapter))
    torch.testing.assert_close(logits_of(full(made.output)), expected, rtol=0, atol=1e-5)


def test_what_a_base_keeps_in_fp32_stays_so(tmp_path: Path, tiny: Path, trained: Path) -> None:
    import torch
    from safetensors.torch import load_file

    base = tmp_path / "base"
    model = full(tiny).to(torch.bfloat16)
    model.model.norm.float()
    model.save_pretrained(str(base))
    made = merge(plan_merge(trained, base=str(base)), tmp_path / "merged")
    weights = load_file(made.output / "model.safetensors")
    wide = [name for name, value in weights.items() if value.dtype == torch.float32]
    assert (made.dtype, wide) == ("bf16", ["model.norm.weight"])


@pytest.mark.parametrize("when", ["merging", "comparing"])
def test_an_interrupted_merge_leaves_nothing_and_one_that_was_killed_is_cleared_away(
    tmp_path: Path, trained: Path, when: str
) -> None:
    def interrupt(line: str) -> None:
        if line.startswith(when):
            raise KeyboardInterrupt

    plan, output = plan_merge(trained), tmp_path / "merged"
    with pytest.raises(KeyboardInterrupt):
        merge(plan, output, say=interrupt)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".merged.merging").mkdir()
    (tmp_path / ".merged.merging" / "model.safetensors").write_bytes(b"half of it")
    output.mkdir()  # an empty folder is as good as none
    merge(plan, output)
    assert [entry.name for entry in tmp_path.iterdir()] == ["merged"]


def test_a_result_that_does_not_say_what_base_and_adapter_say_is_not_kept(
    tmp_path: Path, trained: Path
) -> None:
    plan = plan_merge(trained)
    assert plan.low_ranks is not None
    for scale in (8.0, 0.0):
        wrong = {k: dataclasses.replace(low, scale=scale) for k, low in plan.low_ranks.items()}
        with pytest.raises(
            AdvisorError, match="must say what base and adapter say, but its logits"
        ):
            merge(dataclasses.replace(plan, low_ranks=wrong), tmp_path / "merged")
    overflow = {k: dataclasses.replace(low, scale=1e9) for k, low in plan.low_ranks.items()}
    with pytest.raises(
        DataError, match=r"must be finite, but model.* in fp16 is not; give --dtype"
    ):
        merge(dataclasses.replace(plan, low_ranks=overflow, dtype="fp16"), tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_or_disk_is_said_before_anything_is_written(
    tmp_path: Path, tiny: Path, trained: Path
) -> None:
    plan, output = plan_merge(trained), tmp_path / "merged"
    numbers = sum(p.numel() for p in full(tiny).parameters())
    assert plan.disk_bytes == 2 * numbers
    assert plan.memory_bytes > plan.disk_bytes
    with pytest.raises(UnavailableError, match=r"needs 1152921504\.6 GB of memory, but"):
        merge(dataclasses.replace(plan, memory_bytes=2**60), output)
    with pytest.raises(OutputError, match=r"must have room for 1152921504\.6 GB, but"):
        check_room(dataclasses.replace(plan, disk_bytes=2**60), output)
    assert not output.exists()


def test_what_cannot_be_merged_is_refused_in_a_sentence(
    tmp_path: Path, tiny: Path, trained: Path
) -> None:
    with pytest.raises(MissingInputError, match=r"holds no\s+adapter_config\.json"):
        plan_merge(tmp_path)
    with pytest.raises(UsageError, match="is a full model already: there is no adapter to merge"):
        plan_merge(tiny)
    with pytest.raises(MissingInputError, match=r"nothing is there.* give --base"):
        plan_merge(trained, base=str(tmp_path / "gone"))
    with pytest.raises(MissingInputError, match="only its figures are here; give --base"):
        plan_merge(trained, base="qwen2.5-1.5b")
    quantised = tmp_path / "quantised"
    tiny_model.save_model(quantised)
    figures = json.loads((quantised / "config.json").read_text())
    figures["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantised / "config.json").write_text(json.dumps(figures))
    with pytest.raises(UsageError, match="must be unquantised to be merged into"):
        plan_merge(trained, base=str(quantised))
    torn = tmp_path / "torn"
    tiny_model.save_model(torn)
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:20])
    with pytest.raises(DataError, match="must be a safetensors file, but"):
        plan_merge(trained, base=str(torn))


def test_another_model_is_not_taken_for_the_base(tmp_path: Path, trained: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    other = tmp_path / "other"
    LlamaForCausalLM(
        LlamaConfig(vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                    num_attention_heads=4, bos_token_id=1, eos_token_id=2)
    ).save_pretrained(str(other))  # fmt: skip
    with pytest.raises(DataError, match=r"the adapter must fit the base model, but changes model"):
        plan_merge(trained, base=str(other))


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["--dtype", "int8"], 64, "`--dtype` must be one of bf16, fp16, fp32, but got 'int8'"),
        (["--max-shard-size", "many"], 64, "`--max-shard-size` must be a size such as 500MB"),
        (["--output", "{full}"], 64, "must be a new or empty folder, but holds something"),
        (["--base", "no/where/at/all"], 66, "nothing is there"),
    ],
)
def test_wrong_words_are_answered_with_a_sentence(
    tmp_path: Path,
    tiny: Path,
    trained: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    sentence: str,
) -> None:
    words = [word.format(full=tiny) for word in words]
    given = ["merge", str(trained), "--output", str(tmp_path / "merged"), *words]
    assert cli.main(given) == code
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_full_fine_tuning_has_nothing_to_merge(tmp_path: Path, tiny: Path) -> None:
    run(
        config_of(tiny, method="full", lora=None), tiny / "rows.jsonl", tmp_path, max_steps=1,
        save_steps=100,
    )  # fmt: skip
    with pytest.raises(UsageError, match="is a full model already"):
        plan_merge(tmp_path)


@pytest.mark.real
def test_real_weights_are_merged(tmp_path: Path) -> None:
    import real_model

    base = real_model.smollm2_folder()
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["v_proj"])
    made = merge(plan_merge(adapter), tmp_path / "merged")
    assert (made.dtype, made.changed) == ("bf16", 30)
    assert made.check.relative < 0.5 * TOLERANCE["bf16"] < 0.5 * made.effect.relative
