"""What a model makes of rows that it is not trained on, as the trainer's own step sees them."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lora_advisor.advisor.data_parallel import alone, gathered, my_part
from lora_advisor.advisor.evaluated import Evaluation, PairsSeen, RowsSeen
from lora_advisor.advisor.processes import here
from lora_advisor.probes.errors import UnavailableError
from lora_advisor.probes.finetune import Row
from lora_advisor.probes.preference import holds_pairs, row_lengths

if TYPE_CHECKING:
    from transformers import Trainer


#: What accelerate puts on a model that it prepares.
_PREPARED = ("forward", "_original_forward", "_is_accelerate_prepared")


def evaluate(
    trainer: Trainer,
    rows: Sequence[Row] | None = None,
    *,
    lowered: Callable[[int, int], None] = lambda old, new: None,
) -> Evaluation:
    """Evaluate rows, the longest first; the training after it is as if nothing had been.

    Where memory runs out, the evaluation batch is halved, for all evaluations to come. Of several
    processes each looks at its share of the rows, and all return the same.

    Args:
        trainer: With the model.
        rows: Tokenised rows; None for the trainer's hold-out.
        lowered: Told of a smaller evaluation batch: (before, now).

    Raises:
        UnavailableError: Memory is too small for one row.
    """
    dataset: Any = trainer.eval_dataset if rows is None else _dataset(rows)
    args: Any = trainer.args
    batch = args.per_device_eval_batch_size
    order, seen = here().together(lambda: _look(trainer, dataset))
    fits = min(int(size) for (size,) in here().numbers(args.per_device_eval_batch_size))
    args.per_device_eval_batch_size = fits
    while batch > fits:
        lowered(batch, batch // 2)
        batch //= 2
    order, found = gathered(order, {name: vars(seen)[name] for name in seen.found})
    vars(seen).update(found)
    return seen.evaluation(order)


def _look(trainer: Trainer, dataset: Any) -> tuple[list[int], RowsSeen | PairsSeen]:
    """Return this process's rows and what they came to, in batches as large as memory allows."""
    from lora_advisor.probes.worker import is_out_of_memory

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


def _evaluate(trainer: Trainer, dataset: Any) -> tuple[list[int], RowsSeen | PairsSeen]:
    lengths = row_lengths(dataset)
    order = my_part(sorted(range(len(lengths)), key=lambda row: -lengths[row]))
    plain: Any = trainer.prediction_step
    seen = PairsSeen(trainer) if holds_pairs(dataset) else RowsSeen()

    def counted(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        model = _Kept(model)
        outcome = plain(model, inputs, *args, **kwargs)
        seen.take(float(outcome[0]), model.outputs, inputs)
        model.outputs = None
        return outcome

    over = {"prediction_step": counted, "_get_eval_sampler": lambda *_: order}
    with alone(), _left_as_it_was(trainer), _methods(trainer, over), seen.listening():
        if order:
            trainer.evaluate(eval_dataset=dataset)
    return order, seen


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


def _dataset(rows: Sequence[Row]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({key: [row[key] for row in rows] for key in rows[0]})


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
