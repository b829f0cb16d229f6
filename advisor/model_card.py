"""The model card of a training: README.md beside the adapter, for people and for the hub.

It names no path of the machine: the data by its file name, the base model by its hub id or else by
the name of its folder.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_advisor.advisor.arms import describe
from lora_advisor.advisor.cuts_text import cuts_text
from lora_advisor.advisor.markdown import fenced, plain, table
from lora_advisor.advisor.outcome import TrainingResult
from lora_advisor.advisor.report_training import figures, preference_rows
from lora_advisor.advisor.samples import NO_BASE, Sample
from lora_advisor.probes import unsloth

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

#: Rows of the loss curve's table.
_STEPS = 10
#: What a hub id looks like: owner/name.
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_METHODS = {"lora": "LoRA", "qlora": "QLoRA", "full": "Full fine-tuning"}

_LOADING = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base!r}, dtype="auto")
model = PeftModel.from_pretrained(base, {folder!r})
tokenizer = AutoTokenizer.from_pretrained({folder!r})"""

#: The base in 4 bits, as it was trained on: in 16 bits its weights are not quite the same.
_LOADING_QUANTISED = """\
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

four_bits = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type={quant_type!r},
    bnb_4bit_use_double_quant={double_quant},
    bnb_4bit_compute_dtype={dtype},
)
base = AutoModelForCausalLM.from_pretrained(
    {base!r}, quantization_config=four_bits, dtype={dtype}
)
model = PeftModel.from_pretrained(base, {folder!r})
tokenizer = AutoTokenizer.from_pretrained({folder!r})"""

_LOADING_FULL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained({folder!r})"""


def model_card(
    result: TrainingResult,
    samples: Sequence[Sample] | str,
    *,
    picture: str | None,
    settings: Mapping[str, Any] | None = None,
) -> ModelCard:
    """Return the card of a training.

    Args:
        result: What came of it.
        samples: What the models say; or why that is unknown.
        picture: File of the loss curve, beside the card; None without.
        settings: What else decided the weights (`Settings.identity`); None where unknown.
    """
    from huggingface_hub import ModelCard

    parts = [
        f"# {plain(base_name(result.config.model))}, {_METHODS[result.config.method]}",
        _summary(result),
        "## Load",
        fenced(loading(result), "python"),
        "## Result",
        _outcome(result),
        "## Predicted and measured",
        _predicted(result),
        "## Loss",
        *([f"![Loss by optimizer step]({picture})"] if picture else []),
        _losses(result),
        "## Samples",
        _samples(samples),
        "## Data",
        _data(result),
        "## Configuration",
        plain(describe(result.config)),
        fenced(_configuration(result), "json"),
        "## How it was trained",
        fenced(_command(result, settings or {}), "sh"),
        _settings(settings),
        "## Stack",
        _stack(result),
    ]
    card: ModelCard = ModelCard(
        f"---\n{_front_matter(result)}\n---\n\n" + "\n\n".join(parts) + "\n"
    )
    return card


def loading(result: TrainingResult, folder: str = "path/to/this/folder") -> str:
    """Return the Python code that loads what came out."""
    config = result.config
    forms = {"lora": _LOADING, "qlora": _LOADING_QUANTISED, "full": _LOADING_FULL}
    types = {"bf16": "torch.bfloat16", "fp16": "torch.float16", "fp32": "torch.float32"}
    return forms[config.method].format(
        base=base_name(config.model),
        folder=folder,
        quant_type=config.quant_type,
        double_quant=config.double_quant,
        dtype=types[config.precision],
    )


def base_name(model: str) -> str:
    """Return a model's hub id, or the name of its folder."""
    return model if is_hub_id(model) else Path(model).expanduser().absolute().name


def is_hub_id(model: str) -> bool:
    """Return whether a model is one of the hub's, as `resolve_architecture` decides it."""
    return _HUB_ID.fullmatch(model) is not None and not Path(model).expanduser().exists()


def _front_matter(result: TrainingResult) -> str:
    from huggingface_hub import ModelCardData

    config, base = result.config, None
    full = config.method == "full"
    tags = {"lora-advisor", config.stage, *(["trl"] if config.trainer == "trl" else [])}
    if not full:
        tags |= {"lora", config.method}
    if is_hub_id(config.model):
        base = config.model
        tags.add(f"base_model:{'finetune' if full else 'adapter'}:{base}")
    name = data_name(result)
    data = ModelCardData(
        base_model=base,
        library_name="transformers" if full else "peft",
        pipeline_tag="text-generation",
        tags=sorted(tags),
        datasets=[name] if name == str(result.data).removeprefix("hub:") != str(result.data)
        else None,
    )  # fmt: skip
    return data.to_yaml()


def data_name(result: TrainingResult) -> str:
    """Return the data's hub id or file name."""
    text = str(result.data)
    return text.removeprefix("hub:") if text.startswith("hub:") else result.data.name


def _summary(result: TrainingResult) -> str:
    kind = "A full model" if result.config.method == "full" else "An adapter"
    return (
        f"{kind} for {plain(base_name(result.config.model))}, trained on "
        f"{plain(data_name(result))} with lora-advisor {metadata.version('lora-advisor')}."
    )


def _outcome(result: TrainingResult) -> str:
    what = "DPO loss" if result.config.stage == "dpo" else "negative log-likelihood, nats a token"
    rows = [
        [f"hold-out before ({what})", _number(result.eval_loss_before, ".4f")],
        ["hold-out after", _number(result.eval_loss_after, ".4f")],
    ]
    if result.preference is not None:
        rows += preference_rows(result.preference)
    found = result.likelihood
    if found is not None:
        ends = [_number(end, ".4f") for end in (found.low_nats, found.high_nats)]
        rows.append(
            [
                "its fall, each row weighing the same (95 % interval)",
                f"{found.drop_nats:.4f} ({ends[0]} to {ends[1]}): {found.verdict}",
            ]
        )
    rows.append(["optimizer steps", f"{result.steps:,}"])
    if result.stop is not None:
        kept = f"step {result.stop.kept_step} is kept"
        rows.append(["ended early", f"{result.stop.reason}: {result.stop.detail}; {kept}"])
    rows += [["memory ran out", str(recovery)] for recovery in result.recoveries]
    return table(rows, ["", ""])


def _predicted(result: TrainingResult) -> str:
    return table(figures(result), ["", "predicted", "measured", "measured against predicted"])


def _losses(result: TrainingResult) -> str:
    if not result.losses:
        return "No loss was logged."
    last = len(result.losses) - 1
    shown = sorted({round(last * place / (_STEPS - 1)) for place in range(_STEPS)})
    rows = [[f"{step:,}", f"{loss:.4f}"] for step, loss in (result.losses[at] for at in shown)]
    return table(rows, ["step", "training loss"])


def _samples(samples: Sequence[Sample] | str) -> str:
    if isinstance(samples, str):
        return f"Unknown: {plain(samples)}"
    return samples_text(samples) if samples else "None: no rows were held out."


def samples_text(samples: Sequence[Sample]) -> str:
    """Write what the models say, greedily and cut at a bound, for a card or a file."""
    parts = []
    for number, sample in enumerate(samples, start=1):
        parts.append(f"### {number}")
        for title, text in (
            ("Prompt", sample.prompt),
            ("Reference", sample.reference),
            ("Base", sample.base),
            ("Tuned", sample.tuned),
        ):
            parts.append(f"{title}: {NO_BASE}" if text is None else f"{title}:\n\n{fenced(text)}")
    return "\n\n".join(parts)


def _data(result: TrainingResult) -> str:
    rows, lengths = "rows", "rows have"
    if result.config.stage == "dpo":
        rows, lengths = "pairs", "pairs have a longer sequence of"
    return table(
        [
            ["name", data_name(result)],
            ["sha256", result.data_sha256],
            ["shape", result.shape],
            [f"{rows} trained on", f"{result.rows:,}"],
            [f"{rows} held out", f"{result.holdout_rows:,}"],
            ["long rows", _long_rows(result)],
            *(
                [f"{share:.0%} of the {lengths} at most", f"{length:,} tokens"]
                for share, length in result.length_quantiles.items()
            ),
        ],
        ["", ""],
    )


def _long_rows(result: TrainingResult) -> str:
    return cuts_text(result, result.config.seq_len, result.config.stage) or "none"


def _configuration(result: TrainingResult) -> str:
    data = {**result.config.to_json(), "model": base_name(result.config.model)}
    return json.dumps(data, indent=1)


def _command(result: TrainingResult, settings: Mapping[str, Any]) -> str:
    prefix = "hub:" if str(result.data).startswith("hub:") else ""
    words = ["lora-advisor", "train", "plan.json", "--data", prefix + data_name(result)]
    words += ["--output", "run"]
    for name, option in (
        ("epochs", "--epochs"),
        ("max_steps", "--max-steps"),
        ("learning_rate", "--learning-rate"),
        ("holdout", "--holdout"),
        ("seed", "--seed"),
        ("long_rows", "--long-rows"),
    ):
        if settings.get(name) is not None:
            words += [option, str(settings[name])]
    return shlex.join(words)


def _settings(settings: Mapping[str, Any] | None) -> str:
    text = "plan.json is a plan of the configuration above."
    return text if settings else f"{text} Learning rate, passes and seed are unknown."


def _stack(result: TrainingResult) -> str:
    rows = [[name, version] for name, version in result.stack.packages().items() if version]
    engine = None if result.config.is_buildable else unsloth.engine()
    rows += [] if engine is None else [["engine", engine]]
    return table([*rows, ["device", result.device]], ["", ""])


def _number(value: float | None, form: str) -> str:
    return "unknown" if value is None else format(value, form)
