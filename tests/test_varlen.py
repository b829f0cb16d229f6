"""Packed rows that are kept apart by their bounds train what a mask keeps apart."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from exported import recipe
from tiny_model import save_model
from tiny_training import config_of
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, PrinterCallback, set_seed

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
from lora_advisor.probes import nvml, varlen_attention
from lora_advisor.probes.architectures import from_hf_config, resolve_architecture
from lora_advisor.probes.batching import with_batching
from lora_advisor.probes.cards import find_card
from lora_advisor.probes.config import LoraShape, RunConfig
from lora_advisor.probes.errors import DataError, UnavailableError, UsageError
from lora_advisor.probes.extend import trace_all_layers
from lora_advisor.probes.finetune import Schedule, build_trainer, padding_tokenizer
from lora_advisor.probes.machine import GIB, cpu_machine, detect_stack
from lora_advisor.probes.packed_models import attentions_of
from lora_advisor.probes.packed_rows import FilledUp, useful_tokens
from lora_advisor.probes.plan import DataSummary
from lora_advisor.probes.spec import Spec
from lora_advisor.probes.weights import load_model, require_packages

pytestmark = [
    # peft 0.21 asks transformers 5.23 by names that transformers calls deprecated.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    # torch 2.11 uses what it calls deprecated when its compiler is imported.
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "model"
    save_model(path)
    return path


def _config(model: Path | str, **changes: Any) -> RunConfig:
    values = {
        "trainer": "trl",
        "loss": "one_pass",
        "adapter": "fused",
        "lora": LoraShape(r=4, alpha=8, dropout=0.0, targets="all-linear"),
        "checkpointing": "full",
        "micro_batch": 2,
        "accumulation": 2,
        "seq_len": 64,
        "packing": True,
        "attention": "varlen",
        **changes,
    }
    return config_of(Path(model), **values)


def _rows(count: int) -> list[dict[str, list[int]]]:
    """Return rows of several lengths, in whose prompt nothing is trained."""
    draw = random.Random(7)
    rows = []
    for _ in range(count):
        length, prompt = draw.randint(6, 40), draw.randint(1, 5)
        ids = [draw.randint(3, 258) for _ in range(length)]
        labels = [-100 if at < prompt else token for at, token in enumerate(ids)]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def _trained(config: RunConfig, output: Path, *, device: str = "cpu", **schedule: Any) -> Any:
    """Return a trainer that has trained on packed rows."""
    set_seed(0)
    model = load_model(config, resolve_architecture(config.model), device)
    how: dict[str, Any] = {"max_steps": 5, "learning_rate": 1e-2, **schedule}
    trainer: Any = build_trainer(
        config, model, rows=_rows(120), tokenizer=padding_tokenizer(259), device=device,
        schedule=Schedule(
            output_dir=str(output), logging_steps=1, eval_rows=_rows(6), eval_batch=3, **how
        ),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def _losses(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize(
    "changes",
    [{}, {"loss": "fused", "adapter": "peft"}, {"method": "qlora"}, {"checkpointing": "every_2"}],
    ids=str,
)
def test_it_trains_what_a_mask_keeps_apart(
    changes: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    bounds, masked = (
        _trained(_config(folder, attention=how, **changes), tmp_path / how)
        for how in ("varlen", "sdpa")
    )
    assert len(_losses(bounds)) == 5
    assert _losses(bounds) == pytest.approx(_losses(masked), rel=1e-5)
    counted = [
        [line["num_tokens"] for line in how.state.log_history if "loss" in line]
        for how in (bounds, masked)
    ]
    assert counted[0] == counted[1]  # what is filled up is not counted
    assert bounds.evaluate()["eval_loss"] == pytest.approx(masked.evaluate()["eval_loss"], rel=1e-5)
    trained = dict(masked.model.named_parameters())
    for name, value in bounds.model.named_parameters():
        if value.requires_grad:
            # Of a 4-bit model TRL holds the adapters in bf16.
            close = 1e-3 if value.dtype == torch.bfloat16 else 1e-4
            torch.testing.assert_close(value, trained[name], rtol=10 * close, atol=close)


def test_a_document_sees_no_other(folder: Path) -> None:
    torch.manual_seed(0)
    heads = [torch.randn(1, count, 24, 8) for count in (4, 2, 2)]
    module = torch.nn.Module()
    vars(module).update(num_key_value_groups=2, is_causal=True)
    bounds = torch.tensor([0, 10, 24, 24, 24], dtype=torch.int32)
    attend: Any = varlen_attention.attend
    together, _ = attend(module, *heads, None, cu_seq_lens_q=bounds)

    apart = [
        attend(module, *(part[:, :, begin:end] for part in heads), None)[0]
        for begin, end in ((0, 10), (10, 24))
    ]
    torch.testing.assert_close(together, torch.cat(apart, dim=1))


def test_what_a_model_drops_is_dropped() -> None:
    heads = [torch.randn(1, 2, 8, 8) for _ in range(3)]
    attend: Any = varlen_attention.attend
    bounds = torch.tensor([0, 8], dtype=torch.int32)
    whole, none = (
        attend(torch.nn.Module(), *heads, None, dropout=share, cu_seq_lens_q=bounds)[0]
        for share in (0.0, 1.0)
    )
    assert whole.any() and not none.any()


def _packed(*rows: tuple[int, ...]) -> list[dict[str, list[int]]]:
    return [
        {
            "input_ids": list(range(10, 10 + sum(row))),
            "labels": list(range(10, 10 + sum(row))),
            "seq_lengths": list(row),
        }
        for row in rows
    ]


def _collator(multiple: int = 32) -> FilledUp:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    theirs = DataCollatorForLanguageModeling(pad_token_id=3, padding_free=True)
    return FilledUp(theirs, seq_len=32, multiple=multiple)


def test_micro_batches_are_filled_to_one_shape() -> None:
    collator = _collator()
    batch = collator(_packed((10, 12), (30,)))

    assert batch["input_ids"].shape == (1, 64)
    assert batch["cu_seq_lens_q"].tolist() == [0, 10, 22, 52, 64, *[64] * 12]
    assert batch["max_length_q"] == 32
    assert set(batch["labels"][0, 52:].tolist()) == {-100}
    assert set(batch["input_ids"][0, 52:].tolist()) == {3}
    assert batch["position_ids"][0, 50:56].tolist() == [28, 29, 0, 1, 2, 3]
    assert int(useful_tokens(batch)) == 52
    shapes = {name: value.shape for name, value in batch.items() if torch.is_tensor(value)}
    for rows in (((32,), (32,)), ((4,) * 8, (2, 2)), ((3, 30), (3, 3, 3))):
        other = collator(_packed(*rows))
        assert {n: value.shape for n, value in other.items() if torch.is_tensor(value)} == shapes
        assert other["cu_seq_lens_q"].diff().max() <= 32
    many = collator(_packed((2,) * 16, (4,) * 8))
    assert many["cu_seq_lens_q"].numel() == 33 and int(useful_tokens(many)) == 64
    assert collator(_packed((10,), (8, 3)))["input_ids"].shape == (1, 32)
    full = _collator(96)(_packed((10,), (8, 3)))
    assert full["input_ids"].shape == (1, 96) and full["cu_seq_lens_q"].diff().max() <= 32


def test_rows_of_an_evaluation_are_not_filled() -> None:
    rows = [{key: row[key] for key in ("input_ids", "labels")} for row in _packed((10,), (7,))]
    batch = _collator()(rows)
    assert batch["input_ids"].shape == (1, 17)
    assert batch["cu_seq_lens_q"].tolist() == [0, 10, 17]
    assert useful_tokens({"input_ids": torch.zeros(2, 3)}) == 6


def test_a_micro_batch_reads_nothing_back_and_has_no_mask(folder: Path, tmp_path: Path) -> None:
    trainer = _trained(_config(folder), tmp_path, max_steps=1)
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    seen: list[str] = []
    masks: list[Any] = []

    class Watches(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch leaves it untyped
        """Notes what would make the host wait, or copy from it, within a recording."""

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            name = str(func.name())
            if name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::lift_fresh"):
                seen.append(name)
            return func(*args, **(kwargs or {}))

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **words: Any) -> Any:
        masks.append(mask)
        assert words["max_length_q"] == 64
        return query.transpose(1, 2), None

    trainer.model.train()
    items, watches = torch.tensor(60), Watches()  # type: ignore[no-untyped-call]
    with mock.patch.dict(AttentionInterface._global_mapping, {"varlen": attend}), watches:
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=items)
    assert loss.item() > 0
    assert masks == [None] * len(masks) and masks
    assert seen == []


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


def test_a_mask_of_a_models_own_is_not_overlooked() -> None:
    attend: Any = varlen_attention.attend
    part, bounds = torch.zeros(1, 2, 4, 8), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(UnavailableError, match="its layers mask rows themselves"):
        attend(torch.nn.Module(), part, part, part, torch.zeros(4, 4), cu_seq_lens_q=bounds)


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


def test_what_does_not_go_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match='must be "sdpa" where rows are not packed'):
        _config(folder, packing=False)
    with pytest.raises(UnavailableError, match="the kernel has no fp32 form"):
        require_packages(_config(folder), "cuda")
    monkeypatch.setattr(nvml, "capability", lambda: "7.5")
    with pytest.raises(UnavailableError, match="the kernel needs compute capability"):
        require_packages(_config(folder, precision="fp16"), "cuda")
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


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"compile": "layers"},
        {"cuda_graph": "micro_batch"},
        {"cuda_graph": "micro_batch", "compile": "layers", "checkpointing": "every_2"},
        {"cuda_graph": "micro_batch", "method": "qlora", "recompute": "needed"},
        {"loss": "fused", "adapter": "peft", "checkpointing": "off"},
    ],
    ids=str,
)
def test_on_a_card_it_trains_what_a_mask_keeps_apart(
    changes: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    config = _config(folder, precision="bf16", **changes)
    plain = config.replace(attention="sdpa", cuda_graph="off", compile="off", recompute="layer")
    schedule: dict[str, Any] = {"epochs": 2.0, "max_steps": -1, "learning_rate": 5e-3}
    bounds = _trained(config, tmp_path / "bounds", device="cuda", **schedule)
    masked = _trained(plain, tmp_path / "masked", device="cuda", **schedule)

    assert len(_losses(bounds)) == len(_losses(masked)) > 20
    assert _losses(bounds) == pytest.approx(_losses(masked), abs=0.02)
    if config.cuda_graph != "off":
        assert bounds.replays > 20
    assert bounds.evaluate()["eval_loss"] == pytest.approx(masked.evaluate()["eval_loss"], abs=0.02)
