"""How rows become micro-batches: the ways, the orders behind two of them, and what one costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.prediction import Interval

if TYPE_CHECKING:
    from torch.utils.data import Sampler
    from transformers import Trainer

#: Rows in random order; rows of like length together; short rows in one sequence.
BATCHINGS = ("random", "grouped", "packed")


@dataclass(frozen=True, kw_only=True)
class Batching:
    """What one pass over a data set comes to under one way to make micro-batches.

    Attributes:
        name: One of `BATCHINGS`.
        micro_batches: Micro-batches of a pass.
        optimizer_steps: Optimizer steps of a pass.
        computed_tokens: Tokens that go through the model, padding included.
        useful_tokens: The same without padding.
        seconds: Time of a pass; None where it is not known.
        tokens_per_s: Tokens without padding per second; None likewise.
        rows: Rows that the micro-batches are made of, packed ones of several; None in older plans.
    """

    name: str
    micro_batches: int
    optimizer_steps: int
    computed_tokens: int
    useful_tokens: int
    seconds: Interval | None = None
    tokens_per_s: Interval | None = None
    rows: int | None = None

    @property
    def padding_share(self) -> float:
        """Share of the computed tokens that is padding."""
        return 1 - self.useful_tokens / self.computed_tokens

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read the JSON form."""
        values = dict(data)
        for name in ("seconds", "tokens_per_s"):
            values[name] = None if data.get(name) is None else Interval(**data[name])
        return cls(**values)


def batching_of(config: RunConfig) -> str:
    """Return which of `BATCHINGS` a configuration trains with."""
    if config.packing:
        return "packed"
    return "grouped" if config.group_by_length else "random"


def with_batching(config: RunConfig, name: str, *, packed_attention: str = "sdpa") -> RunConfig:
    """Return the configuration that trains with one of `BATCHINGS`.

    Args:
        config: What is changed.
        name: The batching.
        packed_attention: What takes the place of "sdpa" where rows are packed.

    Raises:
        UsageError: Its trainer cannot.
    """
    packed, attention, recorded = name == "packed", config.attention, config.cuda_graph
    if attention in ("sdpa", "varlen"):
        attention = packed_attention if packed else "sdpa"
    if packed and attention != "varlen":
        recorded = "off"  # packed rows begin elsewhere every time
    return config.replace(
        packing=packed,
        group_by_length=name == "grouped",
        cuda_graph=recorded,
        attention=attention,
    )


def random_order(count: int, *, seed: int, epoch: int = 0) -> list[int]:
    """Return the order in which a trainer takes so many rows when it shuffles.

    accelerate draws it from the seed of torch's generator, which Trainer sets to its own, plus the
    epoch (accelerate/data_loader.py, SeedableRandomSampler).
    """
    import torch
    from torch.utils.data import RandomSampler

    generator = torch.Generator().manual_seed(seed + epoch)
    return list(RandomSampler(range(count), generator=generator))


def grouped_sampler(lengths: Sequence[int], step_rows: int, *, seed: int) -> Sampler[int]:
    """Return transformers' sampler that groups by length, its order drawn from seed and epoch.

    Args:
        lengths: Tokens of each row.
        step_rows: Rows of one optimizer step.
        seed: Of the order.
    """
    import torch
    from transformers.trainer_pt_utils import LengthGroupedSampler

    class SeededGroups(LengthGroupedSampler):
        """Groups rows of like length; the longest row comes first."""

        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            """Take the epoch whose order comes next; the data loader calls it."""
            self.epoch = epoch

        def __iter__(self) -> Iterator[int]:
            """Draw the order of this epoch."""
            self.generator = torch.Generator().manual_seed(seed + self.epoch)
            order: Iterator[int] = super().__iter__()  # type: ignore[no-untyped-call]
            return order

    sampler: Sampler[int] = SeededGroups(step_rows, lengths=list(lengths))
    return sampler


def order_by_length(trainer: Trainer, lengths: Sequence[int], *, seed: int) -> None:
    """Let a trainer that groups by length take the order of `grouped_sampler`.

    Its own is drawn from torch's global generator (transformers/trainer.py, `_get_train_sampler`),
    so a training that goes on after a kill would skip the first rows of another order: some would
    come twice, some never. It also reads every row of the data set to find its length.
    """
    args: Any = trainer.args
    step_rows = args.train_batch_size * args.gradient_accumulation_steps
    order = grouped_sampler(lengths, step_rows, seed=seed)
    vars(trainer)["_get_train_sampler"] = lambda *_: order  # over the method of the class
