"""Training arguments as a user's own script takes them: ours, less what only our trainings need."""

from __future__ import annotations

from typing import Any

from lora_advisor.advisor.export_words import Recipe
from lora_advisor.advisor.schedule import LEARNING_RATES, WARMUP_CEILING, Settings
from lora_advisor.probes.arguments import training_arguments
from lora_advisor.probes.config import RunConfig

#: Of our rows, which are tokens already, and of our own progress.
_OURS = ("disable_tqdm", "remove_unused_columns", "eval_strategy")


def training_of(
    config: RunConfig, recipe: Recipe, *, output_dir: str = "outputs"
) -> dict[str, Any]:
    """Return the keyword arguments of a full training, none of them None.

    Warm-up and schedule are those of `lora-advisor train`. Where the rows are not known the warm-up
    is its longest.
    """
    from dataclasses import replace
    from pathlib import Path

    settings = Settings(
        epochs=recipe.epochs, max_steps=None, holdout=0.0, seed=0, save_steps=50,
        learning_rate=LEARNING_RATES[config.stage], eval_batch=None,
        warmup_steps=WARMUP_CEILING if recipe.rows is None else None,
    )  # fmt: skip
    schedule = settings.schedule(config, rows=recipe.rows or 1, held=(), output=Path(output_dir))
    schedule = replace(schedule, logging_steps=10)
    arguments = training_arguments(config, schedule, device=recipe.device)
    return {
        key: value for key, value in arguments.items() if key not in _OURS and value is not None
    }
