"""The training step, built in ONE place.

The trace, the probes and the full training all call `build_trainer` and then the `train` of what it
returns; they differ in the model's tensors (fake or real), the rows and the number of steps. So a
probe is the first steps of the training it stands for.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_advisor.probes.adapters import lora_config
from lora_advisor.probes.arguments import padding_multiple, training_arguments, trl_arguments
from lora_advisor.probes.batching import order_by_length
from lora_advisor.probes.compiled_layers import compile_layers
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.host_embedding import keep_on_host
from lora_advisor.probes.padding_mask import leave_out_padding_mask
from lora_advisor.probes.randomness import draws_numbers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

#: Rows are tokenised: {"input_ids": [...], "labels": [...]} with -100 where no loss is taken; those
#: of stage "dpo" are `preference.COLUMNS`.
Row = Mapping[str, list[int]]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        max_steps: Optimizer steps; -1 to follow `epochs`.
        epochs: Passes over the rows, where `max_steps` is -1.
        learning_rate: Peak learning rate. 2e-4 is the QLoRA paper's for models up to 13B
            (arXiv 2305.14314, table 9).
        warmup_steps: Steps of linear warm-up.
        scheduler: A name of transformers' SchedulerType.
        seed: Of the data order, dropout and the adapter's start.
        shuffle: Whether the rows are shuffled.
        output_dir: Where checkpoints go.
        save_steps: Steps between two checkpoints; None for none.
        eval_rows: Rows to evaluate on; None for none.
        logging_steps: Steps between two log lines; None for none.
        eval_batch: Sequences in one evaluation batch.
    """

    max_steps: int = -1
    epochs: float = 1.0
    learning_rate: float = 2e-4
    warmup_steps: int = 0
    scheduler: str = "constant"
    seed: int = 0
    shuffle: bool = False
    output_dir: str | None = None
    save_steps: int | None = None
    logging_steps: int | None = None
    eval_rows: Sequence[Row] | None = field(default=None, repr=False)
    eval_batch: int = 1


def build_trainer(
    config: RunConfig,
    model: PreTrainedModel,
    *,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    schedule: Schedule,
    device: str,
    callbacks: Sequence[Any] = (),
) -> Trainer:
    """Return the trainer of a configuration, ready for `train()`.

    Args:
        config: What to build.
        model: The base model, on its device and quantised if the configuration says so.
        rows: Tokenised training rows.
        tokenizer: Gives the padding token.
        schedule: How long to train.
        device: "cuda" or "cpu".
        callbacks: transformers' TrainerCallbacks.
    """
    if not config.is_buildable:
        from lora_advisor.probes import unsloth_step

        trainer = unsloth_step.build_trainer(
            config,
            model,
            rows=rows,
            tokenizer=tokenizer,
            schedule=schedule,
            device=device,
            callbacks=callbacks,
        )
        return _finished(trainer, config, rows, schedule)
    prepare_model(config, model)
    leave_out_padding_mask(model)  # its collators pad on the right
    arguments = training_arguments(config, schedule, device=device)
    checkpointing = arguments["activation_checkpointing_kwargs"]
    if checkpointing is not None and not draws_numbers(config, model):
        # Else the host reads the generators' states for each layer, forward and backward.
        checkpointing["preserve_rng_state"] = False
    with quiet_deprecations():
        if config.stage == "dpo":
            trainer = _dpo_trainer(config, model, rows, tokenizer, schedule, arguments, callbacks)
        elif config.trainer == "trl":
            trainer = _trl_trainer(config, model, rows, tokenizer, schedule, arguments, callbacks)
        else:
            trainer = _plain_trainer(config, model, rows, tokenizer, schedule, arguments, callbacks)
    return _finished(trainer, config, rows, schedule)


def _finished(
    trainer: Trainer, config: RunConfig, rows: Sequence[Row], schedule: Schedule
) -> Trainer:
    """Give a trainer what all of them have."""
    if config.group_by_length and schedule.shuffle:
        order_by_length(trainer, [len(row["input_ids"]) for row in rows], seed=schedule.seed)
    if config.precision == "fp16":
        cast_up_adapters(trainer.model)
    # With each checkpoint TRL would write a card of a model it cannot name; the adapter has one.
    vars(trainer)["create_model_card"] = lambda *_, **__: None
    return trainer


def prepare_model(config: RunConfig, model: PreTrainedModel) -> None:
    """Make of a loaded model what a configuration asks for beside the trainer's own arguments."""
    model.config.use_cache = False
    if config.fp32_upcast:
        _upcast(config, model)
    if config.attention == "varlen":
        from lora_advisor.probes import varlen_attention

        varlen_attention.use_bounds(model)
    if config.embedding == "host":
        keep_on_host(model)
    if config.compile == "layers":
        compile_layers(config, decoder_layers(model), draws=draws_numbers(config, model))


def with_adapter(config: RunConfig, model: PreTrainedModel) -> Any:
    """Return the model with its adapter, for the trainers that do not put it on themselves."""
    from peft import get_peft_model

    if config.method == "full":
        return model
    trained: Any = get_peft_model(model, lora_config(config, model))
    if config.checkpoint_every is not None:
        trained.enable_input_require_grads()
    return trained


def cast_up_adapters(model: Any) -> None:
    """Hold what is trained in fp32 where it is bf16.

    TRL casts the adapters of a quantised model to bf16, which a GradScaler cannot unscale.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype == _bfloat16():
            parameter.data = parameter.data.float()


def _trl_trainer(
    config: RunConfig,
    model: PreTrainedModel,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    schedule: Schedule,
    arguments: dict[str, Any],
    callbacks: Sequence[Any],
) -> Trainer:
    from trl import SFTConfig, SFTTrainer

    # TRL's fused loss asks the configuration for it (trl/trainer/utils.py, `_fused_forward`), where
    # some have it under another name only (GraniteMoeConfig.num_local_experts).
    text = model.config.get_text_config()
    if hasattr(model, "num_experts") and not hasattr(text, "num_experts"):
        text.num_experts = model.num_experts
    kind = SFTTrainer
    if config.cuda_graph != "off":
        from lora_advisor.probes.graph_trainer import GraphTrainer

        kind = GraphTrainer
    elif config.loss == "one_pass":
        from lora_advisor.probes.one_pass_trainer import OnePassTrainer

        kind = OnePassTrainer
    trainer: Trainer = kind(
        model=model,
        args=SFTConfig(
            **arguments,
            **trl_arguments(config),
            # Rows are tokenised, labelled and cut; only packing is left to do.
            dataset_kwargs={"skip_prepare_dataset": not config.packing},
        ),
        train_dataset=as_dataset(rows),
        eval_dataset=None if schedule.eval_rows is None else as_dataset(schedule.eval_rows),
        processing_class=tokenizer,
        peft_config=None if config.method == "full" else lora_config(config, model),
        callbacks=list(callbacks),
    )
    if config.attention == "varlen":
        from lora_advisor.probes.packed_rows import fill_up

        fill_up(trainer, config.seq_len, padding_multiple(config) or 1)
    return trainer


def _dpo_trainer(
    config: RunConfig,
    model: PreTrainedModel,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    schedule: Schedule,
    arguments: dict[str, Any],
    callbacks: Sequence[Any],
) -> Trainer:
    from trl import DPOConfig

    from lora_advisor.probes.preference import preference_trainer

    trainer: Trainer = preference_trainer()(
        model=model,
        args=DPOConfig(**arguments, **trl_arguments(config)),
        train_dataset=as_dataset(rows),
        eval_dataset=None if schedule.eval_rows is None else as_dataset(schedule.eval_rows),
        processing_class=tokenizer,
        peft_config=lora_config(config, model),
        callbacks=list(callbacks),
    )
    return trainer


def _plain_trainer(
    config: RunConfig,
    model: PreTrainedModel,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    schedule: Schedule,
    arguments: dict[str, Any],
    callbacks: Sequence[Any],
) -> Trainer:
    from transformers import Trainer, TrainingArguments

    from lora_advisor.probes.dataset import Collator

    trained = with_adapter(config, model)
    kind = _loop_trainer() if config.trainer == "loop" else Trainer
    return kind(
        model=trained,
        args=TrainingArguments(**arguments),
        train_dataset=as_dataset(rows),
        eval_dataset=None if schedule.eval_rows is None else as_dataset(schedule.eval_rows),
        data_collator=Collator(
            pad_token_id=int(tokenizer.pad_token_id or 0), multiple=padding_multiple(config) or 1
        ),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )


def _loop_trainer() -> type[Trainer]:
    """Return a Trainer cut down to a bare loop: no autocast, no clipping, outputs kept.

    A loop that people write themselves binds the model's outputs to a name, so the logits of a step
    live until those of the next one replace them. What Trainer still adds (order of the data,
    checkpoints, evaluation) allocates nothing on the device inside a step.
    """
    import torch
    from transformers import Trainer

    class LoopTrainer(Trainer):
        """Trainer without autocast that keeps its outputs until the next step."""

        def compute_loss(
            self,
            model: torch.nn.Module,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            loss, self.kept_outputs = super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
            return (loss, self.kept_outputs) if return_outputs else loss

    return LoopTrainer


def _upcast(config: RunConfig, model: PreTrainedModel) -> None:
    from peft import prepare_model_for_kbit_training

    prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=config.checkpoint_every is not None,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )


def decoder_layers(model: Any) -> list[Any]:
    """Return the repeated layers of a model's decoder, first to last.

    Encoders of images and sounds beside it have such layers too.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    def layers(part: Any) -> list[Any]:
        return [m for m in part.modules() if isinstance(m, GradientCheckpointingLayer)]

    get_decoder = getattr(model, "get_decoder", None)
    return (layers(get_decoder()) if get_decoder is not None else []) or layers(model)


def as_dataset(rows: Sequence[Row]) -> Any:
    """Return rows as the trainers take them."""
    from datasets import Dataset

    return Dataset.from_dict({key: [row[key] for row in rows] for key in rows[0]})


def _bfloat16() -> Any:
    import torch

    return torch.bfloat16


@contextlib.contextmanager
def quiet_deprecations() -> Iterator[None]:
    """Silence TRL's notice that `use_liger_kernel` will go: it is what this TRL version offers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*use_liger_kernel.*", category=FutureWarning)
        yield


def numbered_tokenizer(vocab_size: int) -> PreTrainedTokenizerBase:
    """Return a tokenizer with as many words as there are embeddings, each word a number."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "<pad>"]
    words += [f"w{n}" for n in range(vocab_size - len(words))]
    core = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    make: Any = PreTrainedTokenizerFast  # transformers leaves it untyped
    tokenizer: PreTrainedTokenizerBase = make(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="right",
    )
    return tokenizer


def padding_tokenizer(vocab_size: int) -> PreTrainedTokenizerBase:
    """Return a tokenizer for runs on random tokens, where only the padding token matters."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<eos>": min(1, vocab_size - 1)}
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call] # transformers leaves it untyped
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
