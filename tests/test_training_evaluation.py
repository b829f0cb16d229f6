"""An evaluation with a fused loss that Trainer asks for no logits."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import tiny_model
from tiny_training import config_of

pytestmark = [
    # peft 0.21 asks transformers 5.23 by names that transformers calls deprecated.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def test_rows_have_their_losses_where_liger_would_leave_the_logits_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    from lora_advisor.advisor.evaluation import evaluate
    from lora_advisor.advisor.likelihood import RowLosses
    from lora_advisor.probes.architectures import resolve_architecture
    from lora_advisor.probes.dataset import random_rows
    from lora_advisor.probes.finetune import Schedule, build_trainer
    from lora_advisor.probes.tokens import load_tokenizer
    from lora_advisor.probes.weights import load_model

    plain = modeling_llama.LlamaForCausalLM.forward

    @functools.wraps(plain)  # Trainer reads the names of its arguments
    def forward(model: Any, *args: Any, skip_logits: bool = False, **kwargs: Any) -> Any:
        """Leave out the logits as Liger's forward does; its kernels need a GPU."""
        outputs = plain(model, *args, **kwargs)
        if skip_logits:
            outputs.logits = None
        return outputs

    monkeypatch.setattr(modeling_llama.LlamaForCausalLM, "forward", forward)
    tiny_model.save_model(tmp_path)
    config = config_of(tmp_path)
    architecture = resolve_architecture(config.model)
    rows = [row for seq_len in (9, 32, 17) for row in random_rows(2, seq_len, 259)]
    trainer = build_trainer(
        config,
        load_model(config, architecture, "cpu"),
        rows=rows,
        tokenizer=load_tokenizer(architecture),
        schedule=Schedule(max_steps=1, output_dir=str(tmp_path), eval_rows=rows, eval_batch=4),
        device="cpu",
    )
    expected = evaluate(trainer)
    trainer.args.use_liger_kernel = True
    found = evaluate(trainer)

    assert found == expected
    assert isinstance(found.rows, RowLosses)
    assert found.rows.tokens == (8, 8, 31, 31, 16, 16)
    weighed = sum(n * nats for n, nats in zip(found.rows.tokens, found.rows.nats, strict=True))
    assert found.loss == pytest.approx(weighed / sum(found.rows.tokens), rel=1e-6)
