"""Recorded micro-batches train what micro-batches that run as they are train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import WARNINGS, masked_rows, one_pass_config
from transformers import TrainerCallback

from lora_advisor.probes.architectures import resolve_architecture
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import UsageError
from lora_advisor.probes.finetune import Schedule, build_trainer, padding_tokenizer
from lora_advisor.probes.one_pass_trainer import SCORED, CountingCollator, Later
from lora_advisor.probes.weights import load_model

pytestmark = WARNINGS


def _config(model: Path | str, **changes: Any) -> RunConfig:
    return one_pass_config(model, **{"micro_batch": 4, "accumulation": 2, **changes})


def _trained(
    config: RunConfig,
    device: str,
    *,
    rows: int,
    least: int = 20,
    callback: Any = None,
    **schedule: Any,
) -> Any:
    """Return a trainer that has trained on `rows` rows."""
    from transformers import PrinterCallback, set_seed

    set_seed(0)
    model = load_model(config, resolve_architecture(config.model), device)
    trainer: Any = build_trainer(
        config,
        model,
        rows=masked_rows(rows, lengths=(least, 64)),
        tokenizer=padding_tokenizer(259),
        schedule=Schedule(
            learning_rate=5e-3, logging_steps=1, eval_rows=masked_rows(6), eval_batch=2, **schedule
        ),
        device=device,
    )
    trainer.remove_callback(PrinterCallback)
    if callback is not None:
        callback.trainer = trainer
        trainer.add_callback(callback)
    trainer.train()
    return trainer


def _logged(trainer: Any, name: str) -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


def test_counts_are_rounded_up_to_a_few() -> None:
    class Inner:
        def __call__(self, scored: int) -> dict[str, Any]:
            labels = torch.full((2, 33), -100)
            labels[0, 1 : scored + 1] = 5
            return {"input_ids": labels.abs(), "labels": labels}

    collator = CountingCollator(Inner(), sizes=16)
    counts = {n: collator(n)[SCORED] for n in range(33)}
    assert all(n <= counts[n] < n + 4 for n in range(1, 33))
    assert set(counts.values()) == {4, 8, 12, 16, 20, 24, 28, 32}


def test_on_a_cpu_it_trains_as_the_one_pass_trainer_does(tiny: Path) -> None:
    plain, graph = (
        _trained(_config(tiny, cuda_graph=how), "cpu", rows=24, max_steps=3)
        for how in ("off", "micro_batch")
    )
    assert type(graph).__name__ == "GraphTrainer"
    assert _logged(graph, "loss") == pytest.approx(_logged(plain, "loss"), rel=1e-5)
    for name in ("mean_token_accuracy", "num_tokens"):
        assert _logged(graph, name) == pytest.approx(_logged(plain, name), rel=1e-5)
    kept = [p.grad for p in graph.model.parameters() if p.requires_grad]
    assert kept and all(gradient is not None and not gradient.any() for gradient in kept)


def test_a_copy_of_a_later_number_stays() -> None:
    written = torch.tensor(2.0)
    copied = Later(written).copy()
    written.fill_(3.0)
    assert float(copied) == 2.0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"loss": "fused"}, "loss 'fused': other losses read values back"),
        ({"packing": True}, "packing True"),
        ({"precision": "fp16"}, "precision 'fp16'"),
        ({"compile": "model"}, "compile 'model'"),
        ({"checkpointing": "offload"}, "checkpointing 'offload'"),
    ],
)
def test_where_it_cannot_be_is_said(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=f'`cuda_graph` must be "off" with {sentence}'):
        _config("qwen2.5-0.5b", cuda_graph="micro_batch", **changes)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"recompute": "needed"},
        {"compile": "layers"},
        {"compile": "layers", "checkpointing": "every_2"},
        {"method": "qlora", "recompute": "needed"},
        {"embedding": "host"},
    ],
    ids=str,
)
def test_on_a_card_replayed_micro_batches_lose_the_same(
    changes: dict[str, Any], tiny: Path
) -> None:
    schedule: dict[str, Any] = {"epochs": 2.0, "max_steps": -1}
    config = _config(tiny, **{"precision": "bf16", **changes})
    plain = _trained(config.replace(recompute="layer"), "cuda", rows=62, **schedule)
    graph = _trained(config.replace(cuda_graph="micro_batch"), "cuda", rows=62, **schedule)

    assert len(_logged(plain, "loss")) == 16
    assert graph.replays > 10  # of 32 micro-batches
    assert _logged(graph, "loss") == pytest.approx(_logged(plain, "loss"), abs=0.02)
    assert _logged(graph, "num_tokens") == _logged(plain, "num_tokens")
    accuracy = [_logged(trainer, "mean_token_accuracy") for trainer in (graph, plain)]
    assert accuracy[0] == pytest.approx(accuracy[1], abs=0.02)
    before = graph.evaluate()["eval_loss"]
    assert before == pytest.approx(plain.evaluate()["eval_loss"], abs=0.02)


@pytest.mark.gpu
def test_on_a_card_an_evaluation_has_the_graphs_memory_and_training_goes_on(tiny: Path) -> None:
    class Evaluates(TrainerCallback):
        """Evaluates after the third step."""

        trainer: Any = None
        before = after = -1

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                self.before = len(getattr(self.trainer, "_recorded", ()))
                self.trainer.evaluate()
                self.after = len(getattr(self.trainer, "_recorded", ()))

    evaluates = Evaluates()
    how: dict[str, Any] = {"rows": 48, "least": 57, "max_steps": 6}  # all are padded to 64
    config = _config(tiny, precision="bf16", cuda_graph="micro_batch")
    plain = _trained(config.replace(cuda_graph="off"), "cuda", callback=evaluates, **how)
    graph = _trained(config, "cuda", callback=evaluates, **how)
    assert evaluates.before > 0 == evaluates.after
    assert graph.replays > 6
    assert _logged(graph, "loss") == pytest.approx(_logged(plain, "loss"), abs=0.02)
