"""What to do when the device's memory runs out in a step: a smaller micro-batch, the same step."""

from __future__ import annotations

import dataclasses
import gc
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from lora_advisor.probes.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """Memory that ran out, and how the training went on.

    Attributes:
        what: "training" or "evaluation".
        after_step: Optimizer steps of the checkpoint that it went on from.
        micro_batch: Rows of a micro-batch, or of an evaluation batch, that were too many.
        new_micro_batch: Those from then on.
        new_accumulation: Micro-batches of a step from then on; None for an evaluation.
    """

    what: str
    after_step: int
    micro_batch: int
    new_micro_batch: int
    new_accumulation: int | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read the JSON form."""
        return cls(**data)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return dataclasses.asdict(self)

    @property
    def start(self) -> str:
        """Where a training goes on from."""
        return f"checkpoint {self.after_step}" if self.after_step else "the start"

    def __str__(self) -> str:
        """Say it in one line."""
        if self.what == "evaluation":
            return (
                f"memory ran out in an evaluation with {self.micro_batch} rows in a batch; "
                f"going on with {self.new_micro_batch}"
            )
        return (
            f"memory ran out with micro-batch {self.micro_batch}; going on from {self.start} with "
            f"micro-batch {self.new_micro_batch} and {self.new_accumulation} accumulation: as many "
            "rows in a step as before"
        )


def smaller(config: RunConfig) -> RunConfig | None:
    """Return the configuration with the micro-batch halved and as many rows in a step.

    Where half of it does not divide the rows of a step, the next smaller number that does is taken;
    None where there is none.
    """
    rows = config.micro_batch * config.accumulation
    micro = next((n for n in range(config.micro_batch // 2, 0, -1) if rows % n == 0), None)
    return None if micro is None else config.replace(micro_batch=micro, accumulation=rows // micro)


def is_recoverable(error: BaseException) -> bool:
    """Whether a smaller micro-batch helps: not where Python itself gets no memory of the host."""
    from lora_advisor.probes.worker import is_out_of_memory

    return not isinstance(error, MemoryError) and is_out_of_memory(error)


def let_go(error: BaseException) -> None:
    """Drop what the frames of an error hold: the tensors of the step that failed."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__


def release(device: str) -> None:
    """Give back the memory of a trainer that nobody names any more."""
    optimizers = sys.modules.get("bitsandbytes.optim")
    if optimizers is not None:
        # Trainer registers the model's embeddings here for 8-bit optimizers, and nobody removes
        # them (transformers/trainer.py, `create_optimizer`).
        optimizers.GlobalOptimManager.get_instance().initialize()
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()
