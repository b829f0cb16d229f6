"""What a model makes of the rows held out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lora_advisor.probes.tokens import IGNORED

if TYPE_CHECKING:
    from transformers import Trainer


#: What accelerate puts on a model that it prepares.
_PREPARED = ("forward", "_original_forward", "_is_accelerate_prepared")


def evaluate(trainer: Trainer) -> float:
    """Return the mean negative log-likelihood of a trained token of the hold-out, in nats.

    The trainers weigh every batch the same, whatever it holds; so the tokens are counted here.
    """
    plain: Any = trainer.prediction_step
    loss, tokens = 0.0, 0

    def counted(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal loss, tokens
        count = int((inputs["labels"][..., 1:] != IGNORED).sum())
        outcome = plain(model, inputs, *args, **kwargs)
        loss, tokens = loss + float(outcome[0]) * count, tokens + count
        return outcome

    vars(trainer)["prediction_step"] = counted  # over the method of the class
    try:
        with _left_as_it_was(trainer):
            trainer.evaluate()
    finally:
        del vars(trainer)["prediction_step"]
    return loss / tokens


@contextlib.contextmanager
def _left_as_it_was(trainer: Trainer) -> Iterator[None]:
    """Undo what an evaluation leaves behind, so that the steps after it are those of a probe.

    A model that was prepared for evaluation is not prepared again for training (accelerate 1.15,
    `prepare_model`), and would be trained without what only that adds, such as compilation.
    """
    model = vars(trainer.model)
    prepared = {name: model[name] for name in _PREPARED if name in model}
    models, wrapped = list(trainer.accelerator._models), trainer.model_wrapped
    yield
    for name in _PREPARED:
        model.pop(name, None)
    model.update(prepared)
    trainer.accelerator._models[:] = models
    trainer.model_wrapped = wrapped
    vars(trainer).pop("kept_outputs", None)
    if trainer.args.device.type == "cuda":
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
