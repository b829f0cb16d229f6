"""Before the first step: the longest rows or pairs, both ways, so that memory runs out now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import Trainer, TrainerCallback

from lora_advisor.advisor.data_parallel import alone
from lora_advisor.advisor.evaluation import same_random_numbers
from lora_advisor.advisor.processes import here
from lora_advisor.probes.finetune import Row
from lora_advisor.probes.preference import row_lengths

#: What the trainers count for their reports; the rows tried here are no part of it.
_COUNTS = ("_metrics", "_total_train_tokens")


class WorstFirst(TrainerCallback):
    """Tries the longest rows once; gradients and random numbers are as if it had not.

    What is not covered: the optimizer's state, which comes with the first step.
    """

    def __init__(self, trainer: Trainer, evaluate: Callable[[list[Row]], object]) -> None:
        """Take the trainer, and what evaluates rows."""
        self._trainer = trainer
        self._evaluate = evaluate

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Try a micro-batch, and an evaluation batch where there is a hold-out."""
        here().together(lambda: self._train_rows(args.per_device_train_batch_size))
        held: Any = self._trainer.eval_dataset
        if held is not None:
            self._evaluate(_longest(held, args.per_device_eval_batch_size * here().size))

    def _train_rows(self, count: int) -> None:
        import copy

        trainer: Any = self._trainer
        kept = {name: copy.deepcopy(vars(trainer)[name]) for name in _COUNTS if name in
                vars(trainer)}  # fmt: skip
        rows = _longest(trainer.train_dataset, count)
        # Of several processes each tries them by itself, past DDP: none waits for another.
        model = trainer.model_wrapped if here().size == 1 else trainer.model
        with alone(), same_random_numbers():
            batch = trainer.data_collator(rows)
            items = trainer._get_num_items_in_batch([batch], trainer.args.device)
            vars(trainer)["current_gradient_accumulation_steps"] = 1
            # The method of the class: what counts and times the steps does not see this one.
            type(trainer).training_step(trainer, model, batch, items)
        trainer.model.zero_grad()
        vars(trainer).pop("kept_outputs", None)
        vars(trainer).update(kept)


def _longest(rows: Any, count: int) -> list[Any]:
    lengths = row_lengths(rows)
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [rows[row] for row in order[:count]]
