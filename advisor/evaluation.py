"""What a model makes of rows that it is not trained on, as the trainer's own step sees them."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_advisor.advisor.likelihood import RowLosses
from lora_advisor.probes.errors import UnavailableError
from lora_advisor.probes.finetune import Row
from lora_advisor.probes.tokens import IGNORED

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Trainer


#: What accelerate puts on a model that it prepares.
_PREPARED = ("forward", "_original_forward", "_is_accelerate_prepared")

#: Positions whose log-likelihoods are computed at once: 100 MB in fp32 for 200,000 words.
_POSITIONS = 128


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Losses of rows under a model.

    Attributes:
        loss: Mean negative log-likelihood of a trained token, in nats: every token weighs the same.
        rows: The same of each row, in the order of the rows.
    """

    loss: float
    rows: RowLosses


def evaluate(
    trainer: Trainer,
    rows: Sequence[Row] | None = None,
    *,
    lowered: Callable[[int, int], None] = lambda old, new: None,
) -> Evaluation:
    """Evaluate rows, the longest first; the training after it is as if nothing had been.

    Where memory runs out, the evaluation batch is halved, for all evaluations to come.

    Args:
        trainer: With the model.
        rows: Tokenised rows; None for the trainer's hold-out.
        lowered: Told of a smaller evaluation batch: (before, now).

    Raises:
        UnavailableError: Memory is too small for one row.
    """
    from lora_advisor.probes.worker import is_out_of_memory

    dataset: Any = trainer.eval_dataset if rows is None else _dataset(rows)
    args: Any = trainer.args
    while True:
        try:
            return _evaluate(trainer, dataset)
        except Exception as error:
            if isinstance(error, MemoryError) or not is_out_of_memory(error):
                raise
            batch = args.per_device_eval_batch_size
            if batch == 1:
                raise UnavailableError(
                    "the device must have memory to evaluate one row, but it ran out; plan again "
                    "with less --vram or a shorter --seq."
                ) from None
        _empty_cache(trainer)
        args.per_device_eval_batch_size = batch // 2
        lowered(batch, batch // 2)


def _evaluate(trainer: Trainer, dataset: Any) -> Evaluation:
    lengths = [len(ids) for ids in dataset["input_ids"]]
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    plain: Any = trainer.prediction_step
    loss, sums, counts = 0.0, [], []  # type: float, list[float], list[int]

    def counted(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal loss
        model = _Kept(model)
        outcome = plain(model, inputs, *args, **kwargs)
        batch_sums, batch_counts = _row_sums(model.outputs, inputs)
        model.outputs = None
        # The trainers weigh every batch the same, whatever it holds; so the tokens are counted.
        loss += float(outcome[0]) * sum(batch_counts)
        sums.extend(batch_sums)
        counts.extend(batch_counts)
        return outcome

    over = {"prediction_step": counted, "_get_eval_sampler": lambda *_: order}
    with _left_as_it_was(trainer), _methods(trainer, over):
        trainer.evaluate(eval_dataset=dataset)
    nats, tokens = [0.0] * len(order), [0] * len(order)
    for row, total, count in zip(order, sums, counts, strict=True):
        nats[row], tokens[row] = total / count, count
    return Evaluation(
        loss=loss / sum(counts), rows=RowLosses(nats=tuple(nats), tokens=tuple(tokens))
    )


class _Kept:
    """A model whose outputs are kept until they are read."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.outputs: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # With Liger's fused loss Trainer asks for no logits (transformers/trainer.py,
        # `prediction_step`), and a row has no loss of its own then.
        kwargs.pop("skip_logits", None)
        self.outputs = self._model(*args, **kwargs)
        return self.outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _row_sums(outputs: Any, inputs: dict[str, Any]) -> tuple[list[float], list[int]]:
    """Return, for each row of a batch, its negative log-likelihood and its trained tokens."""
    import torch

    labels = inputs["labels"][:, 1:]
    # TRL's fused loss gives the log-likelihoods themselves, and no logits.
    known = getattr(outputs, "log_probs", None)
    losses = _token_losses(outputs.logits, labels) if known is None else -known.float()
    trained = (labels != IGNORED).to(losses.device)
    places = inputs.get("position_ids")
    if places is None:
        row = torch.arange(len(labels), device=losses.device)[:, None].expand_as(labels)
    else:  # rows without padding between them: each begins at place 0
        row = (places == 0).to(losses.device).long().flatten().cumsum(0).view_as(places)[:, 1:] - 1
    size = int(row.max()) + 1
    sums = torch.zeros(size, dtype=torch.float64, device=losses.device)
    counts = torch.zeros(size, dtype=torch.long, device=losses.device)
    sums.index_add_(0, row[trained], losses[trained].double())
    counts.index_add_(0, row[trained], torch.ones_like(row[trained]))
    # Padding at the end of such a batch looks like rows of its own, but trains nothing.
    pairs = [(s, n) for s, n in zip(sums.tolist(), counts.tolist(), strict=True) if n]
    return [s for s, _ in pairs], [n for _, n in pairs]


def _token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the negative log-likelihood of each label; 0 where it is ignored."""
    import torch
    from torch.nn.functional import cross_entropy

    labels = labels.to(logits.device)
    losses = torch.zeros(labels.shape, device=logits.device)
    wanted = (labels != IGNORED).nonzero()
    for start in range(0, len(wanted), _POSITIONS):
        rows, places = wanted[start : start + _POSITIONS].unbind(1)
        losses[rows, places] = cross_entropy(
            logits[rows, places].float(), labels[rows, places], reduction="none"
        )
    return losses


def _dataset(rows: Sequence[Row]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({key: [row[key] for row in rows] for key in ("input_ids", "labels")})


@contextlib.contextmanager
def _methods(trainer: Trainer, over: dict[str, Any]) -> Iterator[None]:
    """Put functions over the methods of the trainer's class."""
    vars(trainer).update(over)
    try:
        yield
    finally:
        for name in over:
            del vars(trainer)[name]


@contextlib.contextmanager
def _left_as_it_was(trainer: Trainer) -> Iterator[None]:
    """Undo what an evaluation leaves behind, so that the steps after it are those of a probe.

    A model that was prepared for evaluation is not prepared again for training (accelerate 1.15,
    `prepare_model`), and would be trained without what only that adds, such as compilation. A data
    loader draws a seed whenever it is iterated, so the generators are put back.
    """
    whole: Any = trainer.model
    model = vars(whole)
    prepared = {name: model[name] for name in _PREPARED if name in model}
    models, wrapped = list(trainer.accelerator._models), trainer.model_wrapped
    training, control = whole.training, dict(vars(trainer.control))
    try:
        with same_random_numbers():
            yield
    finally:
        for name in _PREPARED:
            model.pop(name, None)
        model.update(prepared)
        trainer.accelerator._models[:] = models
        trainer.model_wrapped = wrapped
        whole.train(training)
        vars(trainer.control).update(control)  # its report would count as the step's
        vars(trainer).pop("kept_outputs", None)
        _empty_cache(trainer)


def _empty_cache(trainer: Trainer) -> None:
    if trainer.args.device.type == "cuda":
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextlib.contextmanager
def same_random_numbers() -> Iterator[None]:
    """Put the random number generators back to where they were."""
    import numpy
    import torch

    plain, arrays = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(plain)
    numpy.random.set_state(arrays)
