"""A trainer that shares its step with others: DDP, and what it needs to train the same thing.

Of `size` processes each takes every size-th micro-batch of the order that one alone would take, so
a step has the same rows. Where the rows of an epoch do not come out even, rows without a label fill
it up: they weigh nothing. Where a loss is a mean over a micro-batch, not over the step's tokens, as
for pairs, and for packed rows, the epoch's first rows fill it up instead, as accelerate has it.

What differs from one process: dropout is drawn by each on its own, and sums run in another order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lora_advisor.advisor.processes import here
from lora_advisor.probes.batching import grouped_sampler, random_order
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.tokens import IGNORED

if TYPE_CHECKING:
    from torch.utils.data import Sampler
    from transformers import Trainer, TrainerCallback

#: Figures of a config.json that say how many experts there are: not every one is asked in a step.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")

#: A row too short to cost anything; its first label is never asked for.
_BLANK_TOKENS = 2


def blank_rows(config: RunConfig, rows: int, *, token: int) -> list[dict[str, list[int]]]:
    """Return the rows that fill up an epoch so that all processes have as many micro-batches.

    Args:
        config: What each process runs.
        rows: Rows of the epoch.
        token: Any token of the vocabulary.
    """
    if config.stage != "sft" or config.packing:
        return []
    missing = -rows % (config.micro_batch * here().size) if here().size > 1 else 0
    blank = {"input_ids": [token] * _BLANK_TOKENS, "labels": [IGNORED] * _BLANK_TOKENS}
    return [blank] * missing


def arrange(trainer: Trainer, config: RunConfig, lengths: Sequence[int], *, seed: int) -> None:
    """Have a trainer share its steps; alone, it is left as it is.

    Args:
        trainer: As built, its rows followed by `blank_rows`.
        config: What each process runs.
        lengths: Tokens of each row, without the blank ones.
        seed: Of the order.
    """
    if here().size == 1:
        return
    rows: Any = trainer.train_dataset
    if not trainer.model_accepts_loss_kwargs and not config.packing:
        rows = rows.select(range(len(lengths)))  # a mean over a blank micro-batch is no number
        trainer.train_dataset = rows
    real = len(rows) if config.packing else len(lengths)
    order, epochs = _order(config, real, lengths, seed=seed, blanks=len(rows) - real)
    vars(trainer)["_get_train_sampler"] = lambda *_: order  # over the method of the class
    trainer.add_callback(epochs)
    _set_ddp(trainer)
    if config.stage == "sft":
        # TRL asks all processes for figures that nobody reads here, and so has them wait for each
        # other in every micro-batch (trl/trainer/sft_trainer.py, `compute_loss`).
        vars(trainer.accelerator)["gather_for_metrics"] = lambda values, *_, **__: values


def _order(
    config: RunConfig, rows: int, lengths: Sequence[int], *, seed: int, blanks: int
) -> tuple[Sampler[int], TrainerCallback]:
    """Return the order that one process would take the rows in, the blank ones after it.

    And what tells it the epoch: after a checkpoint in the middle of one the loader does not reach
    it (accelerate/data_loader.py, `set_epoch` with SkipBatchSampler around BatchSamplerShard).
    """
    from torch.utils.data import Sampler
    from transformers import TrainerCallback

    step_rows = config.micro_batch * config.accumulation * here().size
    grouped = grouped_sampler(lengths, step_rows, seed=seed) if config.group_by_length else None

    class SameOrder(Sampler[int]):
        """Drawn from seed and epoch alone."""

        epoch = 0

        def __len__(self) -> int:
            return rows + blanks

        def __iter__(self) -> Iterator[int]:
            """Draw the order of this epoch."""
            if grouped is None:
                yield from random_order(rows, seed=seed, epoch=self.epoch)
            else:
                getattr(grouped, "set_epoch")(self.epoch)  # noqa: B009 # not of every sampler
                yield from grouped
            yield from range(rows, rows + blanks)

    order = SameOrder()

    class Epochs(TrainerCallback):
        """Tells the order which epoch begins, or goes on."""

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Take the epoch."""
            order.epoch = int(state.epoch or 0)

    return order, Epochs()


def _set_ddp(trainer: Any) -> None:
    """Choose what DDP does: gradients live in its buckets, and what is frozen is not sent."""
    from accelerate.utils import DistributedDataParallelKwargs

    model = trainer.model
    figures = model.config.get_text_config().to_dict()
    trainer.accelerator.ddp_handler = DistributedDataParallelKwargs(
        gradient_as_bucket_view=True,
        broadcast_buffers=False,
        find_unused_parameters=any((figures.get(name) or 0) > 1 for name in _EXPERTS),
    )
    # Every process has read or drawn the same base weights (torch/nn/parallel/distributed.py reads
    # this name); only what is trained is sent from the first at the start.
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    model._ddp_params_and_buffers_to_ignore = [*frozen, *(n for n, _ in model.named_buffers())]


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let transformers and accelerate take this process for the only one.

    What is done within waits for nobody, so the processes may do differently much.
    """
    if here().size == 1:
        yield
        return
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    states: list[Any] = [PartialState._shared_state, AcceleratorState._shared_state]
    single = {"distributed_type": DistributedType.NO, "num_processes": 1, "process_index": 0}
    before = [{name: state[name] for name in single if name in state} for state in states]
    for state, known in zip(states, before, strict=True):
        state.update({name: single[name] for name in known})
    try:
        yield
    finally:
        for state, known in zip(states, before, strict=True):
            state.update(known)


def my_part(order: Sequence[int]) -> list[int]:
    """Return what of an evaluation's rows is this process's to look at."""
    return list(order[here().rank :: here().size])


def gathered(mine: Sequence[int], found: dict[str, Any]) -> tuple[list[int], dict[str, Any]]:
    """Return what all processes looked at, and the sums of what they found.

    Args:
        mine: Numbers of the rows that this one looked at.
        found: Numbers and lists by name; lists are joined in the order of the rows returned.
    """
    parts = here().each((list(mine), found))
    order = [row for rows, _ in parts for row in rows]
    total = dict(parts[0][1])
    for _, other in parts[1:]:
        total = {name: total[name] + other[name] for name in total}
    return order, total
