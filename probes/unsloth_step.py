"""Unsloth's training step: its model and kernels, our rows, schedule and measurement.

Runs in a process whose packages are Unsloth's (`unsloth.environment`) and which imports it before
transformers, TRL and peft, for it changes them.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_advisor.probes import unsloth
from lora_advisor.probes.architectures import Architecture, build_hf_config
from lora_advisor.probes.arguments import dtype_name, training_arguments, trl_arguments
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.finetune import as_dataset, numbered_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

    from lora_advisor.probes.finetune import Schedule

#: What of transformers' arguments it decides itself.
_ITS_OWN = (
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
    "use_liger_kernel",
    "liger_kernel_config",
    "torch_compile",
)
_RETURN_LOGITS = "UNSLOTH_RETURN_LOGITS"


def begin() -> Any:
    """Import Unsloth, which asks to be the first; return its FastLanguageModel.

    Raises:
        UnavailableError: The packages of this process are others.
    """
    unsloth.require()
    from unsloth import FastLanguageModel  # type: ignore[import-not-found] # optional

    return FastLanguageModel


def load_model(config: RunConfig, architecture: Architecture, device: str) -> PreTrainedModel:
    """Return the base model as Unsloth loads it; with random weights where none are stored."""
    loader = begin()
    import torch

    with tempfile.TemporaryDirectory() as name:
        stored = architecture.weights
        if stored is None:
            _write_figures(architecture, Path(name))
        source = name if stored is None else str(stored)
        with _handed_over(config, architecture, device) if stored is None else _as_it_is():
            model, _ = loader.from_pretrained(
                model_name=source,
                max_seq_length=config.seq_len,
                dtype=getattr(torch, dtype_name(config)),
                load_in_4bit=config.method == "qlora",
                use_gradient_checkpointing=unsloth.CHECKPOINTING[config.checkpointing],
                use_exact_model_name=True,
            )
    return model  # type: ignore[no-any-return]


def _write_figures(architecture: Architecture, folder: Path) -> None:
    """Write what a model's folder holds beside its weights; each word of its tokenizer is a number.

    Unsloth looks whether there are as many words as embeddings.
    """
    hf_config: Any = build_hf_config(architecture)
    hf_config.save_pretrained(folder)
    numbered_tokenizer(hf_config.get_text_config().vocab_size).save_pretrained(folder)


@contextlib.contextmanager
def _handed_over(config: RunConfig, architecture: Architecture, device: str) -> Iterator[None]:
    """Have the model that Unsloth loads be one of random weights, made on the device.

    To write them to a disk and read them again takes minutes with 7B parameters.
    """
    from transformers import AutoModelForCausalLM

    from lora_advisor.probes.weights import quantise_layer, random_model

    def make(*_: Any, **__: Any) -> Any:
        return random_model(config, architecture, device, quantise=quantise_layer)

    kind: Any = AutoModelForCausalLM
    own = vars(kind).get("from_pretrained")  # mostly it is inherited
    kind.from_pretrained = make
    try:
        yield
    finally:
        del kind.from_pretrained
        if own is not None:
            kind.from_pretrained = own


def _as_it_is() -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def build_trainer(
    config: RunConfig,
    model: PreTrainedModel,
    *,
    rows: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    schedule: Schedule,
    device: str,
    callbacks: Sequence[Any] = (),
) -> Trainer:
    """Return TRL's SFTTrainer, as Unsloth changes it, on its model with its adapter."""
    from trl import SFTConfig, SFTTrainer

    shape = config.lora
    assert shape is not None
    with tempfile.TemporaryDirectory() as name:
        trained = begin().get_peft_model(
            model,
            r=shape.r,
            lora_alpha=shape.alpha,
            lora_dropout=shape.dropout,
            target_modules=list(
                unsloth.ALL_LINEAR if isinstance(shape.targets, str) else shape.targets
            ),
            bias="none",
            use_gradient_checkpointing=unsloth.CHECKPOINTING[config.checkpointing],
            random_state=schedule.seed,
            temporary_location=name,
        )
    arguments = training_arguments(config, schedule, device=device)
    for name in _ITS_OWN:
        del arguments[name]
    trainer: Any = SFTTrainer(
        model=trained,
        args=SFTConfig(
            **arguments,
            **trl_arguments(config),
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=as_dataset(rows),
        eval_dataset=None if schedule.eval_rows is None else as_dataset(schedule.eval_rows),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    _tell_logits(trainer)
    return trainer  # type: ignore[no-any-return]


def _tell_logits(trainer: Any) -> None:
    """Have evaluations get logits, which its fused loss does without."""
    plain = trainer.evaluate

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        os.environ[_RETURN_LOGITS] = "1"
        try:
            return plain(*args, **kwargs)
        finally:
            os.environ[_RETURN_LOGITS] = "0"

    vars(trainer)["evaluate"] = evaluate
