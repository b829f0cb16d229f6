"""Preference pairs: the rows of stage "dpo", and TRL's trainer on rows that are tokens already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl import DPOTrainer

    from lora_advisor.probes.config import RunConfig
    from lora_advisor.probes.finetune import Row

#: What a row of pairs holds: prompt and both completions, as tokens.
COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


def as_trained(config: RunConfig, rows: Sequence[Row]) -> Sequence[Row]:
    """Return full rows as a configuration trains them: as they are, or as pairs.

    A pair's completions are as long as the row, behind a prompt of one token, so that nearly all
    tokens have a loss: the worst case.
    """
    if config.stage != "dpo":
        return rows
    return [
        {
            "prompt_ids": row["input_ids"][:1],
            "chosen_ids": row["input_ids"][1:],
            "rejected_ids": row["input_ids"][:0:-1],
        }
        for row in rows
    ]


def pair_length(row: Mapping[str, Sequence[int]]) -> int:
    """Return the tokens of a pair's longer sequence, prompt included.

    TRL pads both sequences of every pair to the longest of the micro-batch
    (trl/trainer/dpo_trainer.py, DataCollatorForPreference): by this length a pair costs.
    """
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def row_length(row: Mapping[str, Sequence[int]]) -> int:
    """Return what a row or a pair makes its micro-batch long, in tokens."""
    return pair_length(row) if "prompt_ids" in row else len(row["input_ids"])


def holds_pairs(dataset: Any) -> bool:
    """Return whether a `datasets.Dataset` of tokenised rows is one of pairs."""
    return COLUMNS[0] in dataset.column_names


def row_lengths(dataset: Any) -> list[int]:
    """Return `row_length` of each row of a `datasets.Dataset`."""
    if not holds_pairs(dataset):
        return [len(ids) for ids in dataset["input_ids"]]
    columns = (dataset[name] for name in COLUMNS)
    return [pair_length(dict(zip(COLUMNS, row, strict=True))) for row in zip(*columns, strict=True)]


def preference_trainer() -> type[DPOTrainer]:
    """Return TRL's DPOTrainer, which would tokenise rows itself, for rows that are tokens."""
    from trl import DPOTrainer

    class PreferenceTrainer(DPOTrainer):  # type: ignore[misc] # TRL ships no types
        """DPOTrainer on tokenised rows (`COLUMNS`)."""

        def _prepare_dataset(self, dataset: object, *_: object, **__: object) -> object:
            return dataset

        def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
            # TRL turns checkpointing off for the reference's pass and then on again for every
            # layer, whatever "every_n_layers" and "offload" say, with one hook more on the
            # embeddings each time (trl/models/utils.py, `disable_gradient_checkpointing`). Without
            # gradients checkpointing keeps nothing anyway, so it is told that there is none.
            asked: Any = self.model
            asked.is_gradient_checkpointing = False
            try:
                return super()._compute_loss(model, inputs, return_outputs)
            finally:
                del asked.is_gradient_checkpointing

    return PreferenceTrainer
