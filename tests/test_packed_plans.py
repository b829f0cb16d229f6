"""Packed rows in plans: which models, cards and precisions need no mask, and what it costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from exported import recipe
from tiny_training import one_pass_config

from lora_advisor.advisor.attention import packed_attention
from lora_advisor.advisor.epochs import data_report
from lora_advisor.advisor.export import export_config
from lora_advisor.advisor.export_axolotl import AXOLOTL
from lora_advisor.advisor.export_llamafactory import LLAMAFACTORY
from lora_advisor.advisor.export_trl import TRANSFORMERS, TRL
from lora_advisor.advisor.export_unsloth import UNSLOTH
from lora_advisor.advisor.export_words import settle
from lora_advisor.advisor.foreign import import_file
from lora_advisor.advisor.lengths import length_counts
from lora_advisor.advisor.space import build_space
from lora_advisor.cli import main
from lora_advisor.models.replayed import traced_memory
from lora_advisor.probes import nvml
from lora_advisor.probes.architectures import from_hf_config, resolve_architecture
from lora_advisor.probes.batching import with_batching
from lora_advisor.probes.cards import find_card
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import DataError, UnavailableError, UsageError
from lora_advisor.probes.extend import trace_all_layers
from lora_advisor.probes.machine import GIB, cpu_machine, detect_stack
from lora_advisor.probes.packed_models import attentions_of
from lora_advisor.probes.plan import DataSummary
from lora_advisor.probes.spec import Spec
from lora_advisor.probes.weights import require_packages


def _config(model: Path | str, **changes: Any) -> RunConfig:
    values = {"packing": True, "attention": "varlen", **changes}
    return one_pass_config(model, **values)


@pytest.mark.parametrize(
    ("model", "attentions"),
    [
        ("llama-3.2-1b", ("sdpa", "varlen")),
        ("qwen3-1.7b", ("sdpa", "varlen")),
        ("phi-3.5-mini", ("sdpa", "varlen")),  # its window is longer than its positions
        ("gemma-3-1b", ("sdpa",)),  # short windows
        ("gemma-2-2b", ("eager",)),
    ],
)
def test_who_can_be_told_of_bounds(model: str, attentions: tuple[str, ...]) -> None:
    assert attentions_of(resolve_architecture(model)) == attentions


def test_every_model_type_of_transformers_is_judged_and_never_fails() -> None:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    judged = {}
    for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            figures = from_hf_config(kind, AutoConfig.for_model(kind).to_dict())
        except (DataError, ValueError, StrictDataclassError):
            continue  # its defaults are no model
        judged[kind] = attentions_of(figures)[-1] == "varlen"
    assert len(judged) > 100
    assert all(judged[kind] for kind in ("llama", "qwen2", "qwen3", "mixtral", "gpt2", "olmo2"))
    others = ("bert", "roberta", "doge", "gemma4_text", "recurrent_gemma", "deepseek_v3", "gpt_oss",
              "gemma3_text", "qwen3_next", "bloom", "modernbert-decoder")  # fmt: skip
    assert not any(judged[kind] for kind in others)


def test_heads_that_the_kernel_does_not_take_keep_the_mask() -> None:
    llama = dict(resolve_architecture("llama-3.2-1b").hf_config, head_dim=100)
    assert attentions_of(from_hf_config("odd", llama)) == ("sdpa",)


def test_cards_before_ampere_and_fp32_keep_the_mask() -> None:
    llama, gemma = resolve_architecture("llama-3.2-1b"), resolve_architecture("gemma-3-1b")
    ada, turing = find_card("rtx-4060").machine(), find_card("t4").machine()
    assert packed_attention(llama, None, ada, "bf16") == "varlen"
    assert packed_attention(llama, None, ada, "fp32") == "sdpa"
    assert packed_attention(llama, None, turing, "fp16") == "sdpa"
    assert packed_attention(llama, None, cpu_machine(), "fp32") == "varlen"
    assert packed_attention(gemma, None, ada, "bf16") == "sdpa"


def test_a_space_with_packed_rows_has_it_and_graphs(tmp_path: Path) -> None:
    card = find_card("rtx-4060")
    spec = Spec(
        model="llama-3.2-1b", vram_bytes=8 * GIB, seq_len=1024, effective_batch=8, device="none",
        fixed={"packing": True},
    )  # fmt: skip
    config = next(build_space(spec, card.machine(), detect_stack(), card).configs())
    assert (config.attention, config.cuda_graph, config.packing) == ("varlen", "micro_batch", True)
    padded = with_batching(config, "random")
    assert (padded.attention, padded.cuda_graph, padded.packing) == ("sdpa", "micro_batch", False)
    assert with_batching(padded, "packed", packed_attention="varlen") == config
    masked = with_batching(padded, "packed")
    assert (masked.attention, masked.cuda_graph) == ("sdpa", "off")


def test_fit_asks_for_packed_rows_as_plan_does(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["fit", "--model", "smollm2-135m", "--seq", "256", "--micro-batch", "8", "--json",
             "--device", "none", "--no-largest", "--packing"]  # fmt: skip
    found = {}
    for words in ((), ("--attention", "sdpa"), ("--gpu", "t4", "--precision", "fp16")):
        assert main([*asked, *words]) == 0
        answer = json.loads(capsys.readouterr().out)
        memory = answer["prediction"]["memory"]
        found[words] = (answer["config"]["attention"], memory["allocated_bytes"])
    (own, ours), (_, masked), (older, _) = found.values()
    assert (own, older) == ("varlen", "sdpa")
    assert ours < masked


def test_what_does_not_go_is_said(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match='must be "sdpa" where rows are not packed'):
        _config(tiny, packing=False)
    with pytest.raises(UnavailableError, match="the kernel has no fp32 form"):
        require_packages(_config(tiny), "cuda")
    monkeypatch.setattr(nvml, "capability", lambda: "7.5")
    with pytest.raises(UnavailableError, match="the kernel needs compute capability"):
        require_packages(_config(tiny, precision="fp16"), "cuda")
    gemma = resolve_architecture("gemma-3-1b")
    with pytest.raises(UsageError, match="its layers have windows or masks of their own"):
        trace_all_layers(_config("gemma-3-1b", precision="bf16"), gemma, capability="8.9")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--gpu", "t4", "--precision", "fp16"], "the kernel needs compute capability 8.0"),
        (["--gpu", "rtx-4060", "--precision", "fp32"], "the kernel has no fp32 form"),
        (["--gpu", "rtx-4060", "--model", "gemma-3-1b"], "have windows or masks of their own"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "fit"])
def test_a_card_or_a_model_that_cannot_is_told_so(
    command: str, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--model", "llama-3.2-1b", "--device", "none", "--packing", "--attention", "varlen"]
    assert main([command, *asked, *words]) == 64
    said = capsys.readouterr().err.strip().splitlines()
    assert sentence in said[-1]


def _traced(**changes: Any) -> tuple[int, Any]:
    """Return the most that live tensors take and the work of a small Llama's step."""
    figures = dict(
        resolve_architecture("llama-3.2-1b").hf_config, num_hidden_layers=4, vocab_size=4096
    )
    config = _config("any", precision="bf16", seq_len=1024, micro_batch=8, **changes)
    trace = trace_all_layers(config, from_hf_config("any", figures), capability="8.9")
    return (
        traced_memory(trace, expandable=True, cap_bytes=1 << 60).allocated_bytes,
        trace.work,
    )


@pytest.mark.parametrize("compiled", ["off", "layers"])
def test_memory_grows_with_the_tokens_and_not_with_their_square(compiled: str) -> None:
    bounds, work = _traced(compile=compiled)
    padded, plain = _traced(compile=compiled, packing=False, attention="sdpa")
    assert bounds == pytest.approx(padded, rel=0.02)
    flops = {
        how: sum(part.attention_flops for part in found.values())
        for how, found in (("bounds", work), ("padded", plain))
    }
    assert flops["bounds"] == pytest.approx(flops["padded"] / 2)  # two documents in a row
    if compiled == "off":
        masked, _ = _traced(attention="sdpa")
        assert masked > bounds + (8 * 1024) ** 2


def test_a_pass_over_packed_rows_has_one_price() -> None:
    config = _config("any", packing=False, attention="sdpa", micro_batch=4, seq_len=96)
    lengths = [*range(2, 96), *range(50, 96)]
    data = DataSummary(
        path="a", rows=len(lengths), tokens=sum(lengths), truncated=0, dropped=0,
        length_counts=length_counts(lengths),
    )  # fmt: skip
    (packed,) = data_report(data, config, None, names=("packed",), packed_attention="varlen")
    (masked,) = data_report(data, config, None, names=("packed",))
    assert masked.padding_share == 0
    assert packed.micro_batches == masked.micro_batches
    assert 0 < packed.padding_share < 0.03
    assert packed.computed_tokens % 16 == 0
    compiled = config.replace(compile="layers")
    (full,) = data_report(data, compiled, None, names=("packed",), packed_attention="varlen")
    assert full.computed_tokens == full.micro_batches * 4 * 96


def test_a_script_keeps_packed_rows_apart_and_is_read_back(tmp_path: Path) -> None:
    config = _config("qwen2.5-1.5b", precision="bf16", cuda_graph="micro_batch")
    kept, lost = settle(config, TRL.rules(recipe()))
    assert kept == config and not lost
    made = export_config(config, recipe(), TRL)
    assert made is not None
    assert "    use_bounds(model)\n" in made.text and "    fill_up(trainer, 64, 8)\n" in made.text
    file = tmp_path / "train.py"
    file.write_text(made.text, "utf-8")
    assert import_file(file).config == config


@pytest.mark.parametrize(
    ("target", "attention", "packing"),
    [
        (AXOLOTL, "flash_attention_2", True),
        (LLAMAFACTORY, "sdpa", False),
        (UNSLOTH, "sdpa", True),
        (TRANSFORMERS, "sdpa", False),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_other_targets_say_what_takes_its_place(target: Any, attention: str, packing: bool) -> None:
    config = _config("qwen2.5-1.5b", precision="bf16", cuda_graph="micro_batch")
    settled, lost = settle(config, target.rules(recipe()))
    assert (settled.attention, settled.packing) == (attention, packing)
    assert lost
