"""`Spec`: what the user wants, before anything is measured."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.cutting import check_long_rows
from lora_advisor.probes.errors import UsageError

OBJECTIVES = ("tokens_per_s", "joules_per_token", "seq_len")

#: Fields of RunConfig that a user may fix. The others follow from the spec or from these.
KNOBS = tuple(
    field.name
    for field in dataclasses.fields(RunConfig)
    if field.name not in ("model", "seq_len", "accumulation", "lora")
)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What the user wants.

    Attributes:
        model: As in RunConfig.
        data: Path of the training data; None for planning without.
        vram_bytes: Memory of the card to plan for (on a CPU: RAM), context and reserve included.
        reserve_bytes: Memory to leave free of it.
        seq_len: Tokens in one sequence.
        effective_batch: Sequences in one optimizer step; never changed silently.
        epochs: Passes over the data.
        fixed: Knobs of RunConfig that stay as given, by name.
        rank: Rank of the adapter.
        alpha: Scale of the adapter.
        dropout: Dropout of the adapter.
        targets: "all-linear" or names of modules.
        probe_budget_s: Seconds the probes may take in all.
        objective: One of OBJECTIVES.
        device: "cuda", "cpu", or "none" to predict for a card that is not here.
        gpu: Name of that card in the card table; None where it is here.
        trust_remote_code: Whether code that comes with the model may run.
        seed: Of the search.
        free_trials: Trials of the search that are the sampler's own choice.
        longer: Whether longer sequences are looked at too, for the front.
        long_rows: What becomes of rows that are longer than a sequence: one of `cutting.LONG_ROWS`.
        gpus: Cards of one kind in one host that share every optimizer step.
        batch_named: Whether the user named the effective batch.
    """

    model: str
    vram_bytes: int
    data: str | None = None
    reserve_bytes: int = 0
    seq_len: int = 1024
    effective_batch: int = 16
    epochs: float = 1.0
    fixed: Mapping[str, Any] = field(default_factory=dict)
    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    probe_budget_s: float = 300.0
    objective: str = "tokens_per_s"
    device: str = "none"
    gpu: str | None = None
    trust_remote_code: bool = False
    seed: int = 0
    free_trials: int = 5
    longer: bool = False
    long_rows: str = "truncate"
    batch_named: bool = True
    gpus: int = 1

    def __post_init__(self) -> None:
        """Refuse what no plan can meet."""
        if self.vram_bytes <= 0:
            raise UsageError(
                f"`--vram` must be above 0 GiB, but got {self.vram_bytes / 2**30:g}; "
                "give the card's memory."
            )
        if not 0 <= self.reserve_bytes < self.vram_bytes:
            raise UsageError(
                "`--reserve` must be at least 0 and below --vram, but got "
                f"{self.reserve_bytes / 2**30:g} GiB."
            )
        if self.seq_len < 2:
            raise UsageError(f"`--seq` must be at least 2 tokens, but got {self.seq_len}.")
        if self.effective_batch < 1:
            raise UsageError(
                f"`--batch` must be at least 1 sequence, but got {self.effective_batch}."
            )
        if self.gpus < 1:
            raise UsageError(f"`--gpus` must be at least 1, but got {self.gpus}.")
        if self.effective_batch % self.gpus:
            below = self.effective_batch // self.gpus * self.gpus
            near = f"{below} or {below + self.gpus}" if below else f"{self.gpus}"
            raise UsageError(
                f"`--batch` must be divisible by --gpus {self.gpus}, but got "
                f"{self.effective_batch}; give {near}."
            )
        if not self.epochs > 0:
            raise UsageError(f"`--epochs` must be above 0, but got {self.epochs:g}.")
        if self.epochs == math.inf:
            raise UsageError("`--epochs` must be a finite number, but got inf.")
        if not self.probe_budget_s > 0:
            raise UsageError(
                f"`--budget` must be above 0 seconds, but got {self.probe_budget_s:g}."
            )
        if self.objective not in OBJECTIVES:
            raise UsageError(
                f"`--objective` must be one of {', '.join(OBJECTIVES)}, but got {self.objective!r}."
            )
        check_long_rows(self.long_rows, self.fixed.get("stage", "sft"))
        unknown = sorted(set(self.fixed) - set(KNOBS))
        if unknown:
            raise UsageError(f"`{unknown[0]}` cannot be fixed; the knobs are {', '.join(KNOBS)}.")

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        data = dataclasses.asdict(self)
        data["fixed"] = dict(self.fixed)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read the JSON form; fields of newer versions are dropped."""
        names = {field.name for field in dataclasses.fields(cls)}
        values = {key: value for key, value in data.items() if key in names}
        if isinstance(values.get("targets"), list):
            values["targets"] = tuple(values["targets"])
        return cls(**values)
