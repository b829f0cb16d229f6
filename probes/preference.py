"""Preference pairs: the rows of stage "dpo", and TRL's trainer on rows that are tokens already."""

from __future__ import annotations

from collections.abc import Sequence
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
