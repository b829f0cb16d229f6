"""Packed rows that are kept apart by their bounds train what a mask keeps apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tiny_training import WARNINGS, masked_rows, one_pass_config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, PrinterCallback, set_seed

from lora_advisor.probes import varlen_attention
from lora_advisor.probes.architectures import resolve_architecture
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import UnavailableError
from lora_advisor.probes.finetune import Schedule, build_trainer, padding_tokenizer
from lora_advisor.probes.packed_rows import FilledUp, useful_tokens
from lora_advisor.probes.weights import load_model

pytestmark = WARNINGS


def _config(model: Path | str, **changes: Any) -> RunConfig:
    values = {"packing": True, "attention": "varlen", **changes}
    return one_pass_config(model, **values)


def _rows(count: int) -> list[dict[str, list[int]]]:
    return masked_rows(count, lengths=(6, 40), prompt=5)


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
    changes: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    bounds, masked = (
        _trained(_config(tiny, attention=how, **changes), tmp_path / how)
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


def test_a_document_sees_no_other(tiny: Path) -> None:
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


def test_a_micro_batch_reads_nothing_back_and_has_no_mask(tiny: Path, tmp_path: Path) -> None:
    trainer = _trained(_config(tiny), tmp_path, max_steps=1)
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


def test_a_mask_of_a_models_own_is_not_overlooked() -> None:
    attend: Any = varlen_attention.attend
    part, bounds = torch.zeros(1, 2, 4, 8), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(UnavailableError, match="its layers mask rows themselves"):
        attend(torch.nn.Module(), part, part, part, torch.zeros(4, 4), cu_seq_lens_q=bounds)


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
    changes: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    config = _config(tiny, precision="bf16", **changes)
    plain = config.replace(attention="sdpa", cuda_graph="off", compile="off", recompute="layer")
    schedule: dict[str, Any] = {"epochs": 2.0, "max_steps": -1, "learning_rate": 5e-3}
    bounds = _trained(config, tmp_path / "bounds", device="cuda", **schedule)
    masked = _trained(plain, tmp_path / "masked", device="cuda", **schedule)

    assert len(_losses(bounds)) == len(_losses(masked)) > 20
    assert _losses(bounds) == pytest.approx(_losses(masked), abs=0.02)
    if config.cuda_graph != "off":
        assert bounds.replays > 20
    assert bounds.evaluate()["eval_loss"] == pytest.approx(masked.evaluate()["eval_loss"], abs=0.02)
