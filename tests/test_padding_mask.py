"""Rows that are padded on the right train the same without the mask that says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_zoo import KINDS
from tiny_training import config_of, run
from transformers import LlamaModel

from lora_advisor.probes import finetune
from lora_advisor.probes.config import LoraShape
from lora_advisor.probes.padding_mask import leave_out_padding_mask
from lora_advisor.probes.weights import skeleton

pytestmark = [
    # peft 0.21 asks transformers 5.23 by names that transformers calls deprecated.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

ROWS = (9, 40, 57)


def _model(kind: str) -> Any:
    torch.manual_seed(0)
    config, architecture = KINDS[kind].config, KINDS[kind].architecture
    model: Any = skeleton(config, architecture, "cpu", layers=None, dtype=torch.float32)
    model.to_empty(device="cpu")
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.05)
    model.init_weights()
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    return model.train()


def _batch(vocabulary: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    shape = (len(ROWS), max(ROWS) + 7)
    ids = torch.randint(3, vocabulary, shape)
    mask = (torch.arange(shape[1]) < torch.tensor(ROWS)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def _trained(model: Any) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    loss = model(**_batch(1000)).loss
    loss.backward()
    return float(loss.detach()), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_the_same(kind: str) -> None:
    model = _model(kind)
    loss, gradients = _trained(model)
    seen: list[Any] = []
    assert leave_out_padding_mask(model)
    model.get_decoder().register_forward_pre_hook(
        lambda _, args, words: seen.append(words["attention_mask"]), with_kwargs=True
    )
    without, others = _trained(model)
    assert seen == [None]
    assert without == pytest.approx(loss, rel=1e-5)
    assert len(others) == len(gradients)
    scale = max(float(one.abs().max()) for one in gradients)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * scale)


def test_a_model_that_is_not_trained_keeps_its_mask() -> None:
    model = _model("qwen3: queries and keys normed")
    batch = {**_batch(1000), "attention_mask": torch.ones(3, 64, dtype=torch.long)}
    batch["attention_mask"][:, :9] = 0  # on the left, as for generation
    model.eval()
    with torch.no_grad():
        loss = float(model(**batch).loss)
        leave_out_padding_mask(model)
        assert float(model(**batch).loss) == loss
        model.train()
        assert float(model(**batch).loss) != loss


def test_a_model_whose_tokens_see_what_follows_keeps_its_mask() -> None:
    model = _model("qwen3: queries and keys normed")
    model.config.use_bidirectional_attention = True
    assert not leave_out_padding_mask(model)
    assert not model.get_decoder()._forward_pre_hooks


@pytest.mark.parametrize("trainer", ["trl", "transformers"])
def test_trainings_take_no_mask_and_come_to_the_same(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, trainer: str
) -> None:
    lora = LoraShape(r=4, alpha=8, dropout=0.0, targets="all-linear")
    config = config_of(
        tiny, trainer=trainer, loss="fused" if trainer == "trl" else "full", lora=lora
    )
    masks: list[tuple[bool, bool]] = []
    plain = LlamaModel.forward

    def forward(decoder: Any, *arguments: Any, **words: Any) -> Any:
        masks.append((decoder.training, words.get("attention_mask") is not None))
        return plain(decoder, *arguments, **words)

    monkeypatch.setattr(LlamaModel, "forward", forward)
    found = [run(config, tiny / "rows.jsonl", tmp_path / "without", max_steps=8)]
    assert (True, False) in masks
    assert (True, True) not in masks
    assert (False, True) in masks  # the hold-out, evaluated
    masks.clear()
    monkeypatch.setattr(finetune, "leave_out_padding_mask", lambda model: False)
    found.append(run(config, tiny / "rows.jsonl", tmp_path / "with", max_steps=8))
    assert (True, True) in masks
    assert found[0].eval_loss_after == pytest.approx(found[1].eval_loss_after, rel=1e-4)
    assert found[0].measured.tokens_per_s != found[0].measured.padded_tokens_per_s  # still counted
    assert dict(found[0].losses) == pytest.approx(dict(found[1].losses), rel=1e-4)


def test_ctrl_c_within_a_step_leaves_transformers_as_it_was() -> None:
    from transformers import masking_utils

    original = masking_utils.find_packed_sequence_indices
    kind = next(kind for kind in KINDS if kind.startswith("phi3"))
    model = _model(kind)
    assert leave_out_padding_mask(model)
    seen: list[Any] = []

    def interrupt(*_: Any) -> None:
        seen.append(masking_utils.find_packed_sequence_indices)
        raise KeyboardInterrupt

    handle = finetune.decoder_layers(model)[0].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**_batch(1000))
    handle.remove()

    assert seen != [original]
    assert masking_utils.find_packed_sequence_indices is original
