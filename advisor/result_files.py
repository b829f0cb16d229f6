"""What a training leaves beside result.json: samples, the picture of its loss, the model card.

samples.json, samples.md                what base and tuned model say to prompts held out
adapter/README.md, adapter/loss.png     the model card and its picture
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_advisor.advisor.loss_picture import draw_loss
from lora_advisor.advisor.model_card import model_card, samples_text
from lora_advisor.advisor.outcome import TrainingResult
from lora_advisor.advisor.run_folder import write_json
from lora_advisor.advisor.samples import Sample, sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CARD, PICTURE = "README.md", "loss.png"
SAMPLES, SAMPLES_TEXT = "samples.json", "samples.md"


def write_samples(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    held: Sequence[Mapping[str, list[int]]],
    folder: Path,
) -> None:
    """Write what the models say to the first rows held out.

    Samples that cannot be made lose nothing: samples.json says why there are none.

    Args:
        model: The trained model, left as it was.
        tokenizer: Its tokenizer.
        held: Tokenised rows held out.
        folder: The run's folder.

    Raises:
        OSError: A file cannot be written.
    """
    from lora_advisor.probes.worker import first_line

    try:
        made = sample(model, tokenizer, held)
    except Exception as error:  # models raise what their authors chose, and memory may run out
        write_json(folder / SAMPLES, {"samples": [], "unknown": first_line(error)})
        (folder / SAMPLES_TEXT).unlink(missing_ok=True)  # perhaps of an earlier training
        return
    write_json(folder / SAMPLES, {"samples": [one.to_json() for one in made]})
    _write(folder / SAMPLES_TEXT, f"# Samples\n\n{samples_text(made)}\n")


def write_card(
    result: TrainingResult, folder: Path, *, settings: Mapping[str, Any] | None = None
) -> None:
    """Write the model card of a training that has ended, and its picture, into the adapter.

    Args:
        result: What came of the training.
        folder: The run's folder, with what `write_samples` wrote.
        settings: `Settings.identity` of the training; None where unknown.

    Raises:
        OSError: A file cannot be written.
        OutputError: The picture cannot be.
    """
    draw_loss(result, result.adapter / PICTURE)
    card = model_card(result, read_samples(folder), picture=PICTURE, settings=settings)
    _write(result.adapter / CARD, card.content)


def read_samples(folder: Path) -> tuple[Sample, ...] | str:
    """Return the samples of a run's folder, or why there are none."""
    try:
        data = json.loads((folder / SAMPLES).read_text("utf-8"))
    except (OSError, ValueError):
        return "none were made"
    return data.get("unknown") or tuple(Sample.from_json(one) for one in data["samples"])


def _write(file: Path, text: str) -> None:
    """Replace a file as a whole."""
    beside = file.with_name(f".{file.name}.new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(file)
