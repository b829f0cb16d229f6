"""What beside configuration, model and data decides a training: its length, speed and seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import UsageError
from lora_advisor.probes.finetune import Row, Schedule

#: The warm-up is one step in so many, up to the ceiling: enough for Adam's averages to fill.
WARMUP_SHARE, WARMUP_CEILING = 20, 10

#: Peak learning rate where the user names none, by stage: the QLoRA paper's for models up to 13B
#: (arXiv 2305.14314, table 9), and that of TRL's own script for LoRA (trl/scripts/dpo.py).
LEARNING_RATES = {"sft": 2e-4, "dpo": 5e-6}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The user's wishes, checked; as in `training.train`."""

    epochs: float
    max_steps: int | None
    learning_rate: float
    holdout: float
    seed: int
    save_steps: int
    eval_batch: int | None
    eval_steps: int | None = None
    warmup_steps: int | None = None
    check_rows: int | None = None
    drop_known: bool = False
    long_rows: str = "truncate"

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        if not self.epochs > 0:
            raise UsageError(f"`epochs` must be above 0, but got {self.epochs!r}.")
        if self.epochs == math.inf:
            raise UsageError("`epochs` must be a finite number, but got inf.")
        if self.max_steps is not None and self.max_steps < 1:
            raise UsageError(f"`max_steps` must be at least 1, but got {self.max_steps!r}.")
        if not 0 < self.learning_rate < math.inf:
            raise UsageError(f"`learning_rate` must be above 0, but got {self.learning_rate!r}.")
        if not 0 <= self.holdout < 1:
            raise UsageError(f"`holdout` must lie in [0, 1), but got {self.holdout!r}.")
        if self.save_steps < 1:
            raise UsageError(f"`save_steps` must be at least 1, but got {self.save_steps!r}.")
        if self.eval_batch is not None and self.eval_batch < 1:
            raise UsageError(f"`eval_batch` must be at least 1, but got {self.eval_batch!r}.")
        if self.eval_steps is not None and self.eval_steps < 1:
            raise UsageError(f"`eval_steps` must be at least 1, but got {self.eval_steps!r}.")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise UsageError(f"`warmup_steps` must be at least 0, but got {self.warmup_steps!r}.")
        if self.check_rows is not None and self.check_rows < 0:
            raise UsageError(f"`check_rows` must be at least 0, but got {self.check_rows!r}.")

    def identity(self) -> dict[str, float | int | str | None]:
        """Return what decides the weights that come out; what is left at its default is left out.

        The older settings are there always, as state.json has them.
        """
        later: dict[str, int | str | None] = {}
        if self.warmup_steps is not None:
            later["warmup_steps"] = self.warmup_steps
        if self.drop_known:
            later.update(drop_known=True, check_rows=self.check_rows)
        if self.long_rows != "truncate":
            later["long_rows"] = self.long_rows
        return {
            "epochs": self.epochs,
            "max_steps": self.max_steps,
            "learning_rate": self.learning_rate,
            "holdout": self.holdout,
            "seed": self.seed,
            **later,
        }

    def schedule(
        self, config: RunConfig, *, rows: int, held: Sequence[Row], output: Path
    ) -> Schedule:
        """Return the trainer's form of it, for so many rows."""
        # With packing the steps are fewer; the warm-up then takes a larger share of them.
        batches = math.ceil(rows / config.micro_batch)
        an_epoch = math.ceil(batches / config.accumulation)
        steps = self.max_steps or math.ceil(self.epochs * an_epoch)
        return Schedule(
            max_steps=self.max_steps or -1,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            warmup_steps=min(WARMUP_CEILING, steps // WARMUP_SHARE)
            if self.warmup_steps is None
            else self.warmup_steps,
            scheduler="linear",
            seed=self.seed,
            shuffle=True,
            output_dir=str(output),
            save_steps=self.save_steps,
            eval_rows=held or None,
            eval_batch=self.eval_batch or config.micro_batch,
        )
