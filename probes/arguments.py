"""A configuration in the words of the libraries: keyword arguments, nothing left to defaults.

What is trained here (`finetune.py`, `weights.py`, `adapters.py`), what is written for others and
what `autoconfigure` hands out is made of these. Nothing heavy is imported: dtypes are named.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lora_advisor.probes.config import RunConfig

if TYPE_CHECKING:
    from lora_advisor.probes.finetune import Schedule

#: So many lengths batches may have at most, and with fewer than so many they are not padded.
_LENGTHS = (64, 32)
#: So many of rows that are grouped by length where layers are compiled.
_GROUPED_COMPILED_LENGTHS = 4
#: So many where micro-batches are recorded, each length anew, and layers are not compiled.
_RECORDED_LENGTHS = 8


def training_arguments(config: RunConfig, schedule: Schedule, *, device: str) -> dict[str, Any]:
    """Return the keyword arguments that transformers' and TRL's arguments have in common."""
    autocast = config.trainer != "loop"
    shuffled = "group_by_length" if config.group_by_length else "random"
    arguments: dict[str, Any] = {
        "output_dir": schedule.output_dir,
        "per_device_train_batch_size": config.micro_batch,
        "per_device_eval_batch_size": schedule.eval_batch,
        "gradient_accumulation_steps": config.accumulation,
        "max_steps": schedule.max_steps,
        "num_train_epochs": schedule.epochs,
        "learning_rate": schedule.learning_rate,
        "lr_scheduler_type": schedule.scheduler,
        "warmup_steps": schedule.warmup_steps,
        "optim": config.optimizer,
        "bf16": autocast and config.precision == "bf16",
        "fp16": autocast and config.precision == "fp16" and device == "cuda",
        "activation_checkpointing": config.checkpoint_every is not None,
        "activation_checkpointing_kwargs": checkpointing_arguments(config),
        "torch_compile": config.compile == "model",
        "use_liger_kernel": config.kernels == "liger",
        "liger_kernel_config": _liger_config(config),
        "use_cpu": device != "cuda",
        "seed": schedule.seed,
        # Full rows, the only ones that are not shuffled, need no grouping.
        "train_sampling_strategy": shuffled if schedule.shuffle else "sequential",
        "save_strategy": "no" if schedule.save_steps is None else "steps",
        "eval_strategy": "no",
        "logging_strategy": "no" if schedule.logging_steps is None else "steps",
        # It reads every micro-batch's loss back: the host waits for the device, and the device then
        # for the host. The guards see what is not finite.
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "report_to": "none",
        "dataloader_pin_memory": device == "cuda",
        "remove_unused_columns": False,
        # The bare loop clips nothing; the trainers clip at 1.0, their default.
        "max_grad_norm": 1.0 if autocast else 0.0,
    }
    if schedule.save_steps is not None:
        arguments["save_steps"] = schedule.save_steps
        arguments["save_total_limit"] = 2
    if schedule.logging_steps is not None:
        arguments["logging_steps"] = schedule.logging_steps
    return arguments


def checkpointing_arguments(config: RunConfig) -> dict[str, Any] | None:
    """Return how layers are checkpointed; None where none is."""
    if config.checkpoint_every is None:
        return None
    arguments: dict[str, Any] = {"use_reentrant": False}
    if config.checkpoint_every > 1:
        arguments["every_n_layers"] = config.checkpoint_every
    if config.checkpointing == "offload":
        arguments["offload"] = True
    if config.cuda_graph != "off":  # no state of a generator is read where kernels are recorded
        arguments["preserve_rng_state"] = False
    return arguments


def _liger_config(config: RunConfig) -> dict[str, bool] | None:
    if config.kernels != "liger":
        return None
    fused = config.loss == "fused" and config.trainer != "trl"  # TRL brings its own fused loss
    return {"fused_linear_cross_entropy": fused, "cross_entropy": False}


def trl_arguments(config: RunConfig) -> dict[str, Any]:
    """Return what TRL's arguments have beside transformers'."""
    arguments: dict[str, Any] = {
        "max_length": config.seq_len,
        "pad_to_multiple_of": None if config.packing else padding_multiple(config),
    }
    if config.stage == "sft":
        arguments.update(packing=config.packing, eval_packing=False)
    return arguments


def padding_multiple(config: RunConfig) -> int | None:
    """Return what lengths are padded to a multiple of; None for the longest row of a batch.

    A length of its own for every batch is dear: cuDNN's attention makes a plan for each shape it
    has not seen, which takes 0.1 s and more on an H100 (benchmarks/varied_lengths.py), and compiled
    code is for one shape, dynamo giving up on a layer after some of them
    (probes/compiled_layers.py). So batches have few lengths, all parts of `seq_len`: 64, or 32 at
    least; where layers are compiled the full one, or four of rows that are grouped by length; where
    micro-batches are recorded as CUDA graphs eight. Packed rows lie end to end: where no mask
    keeps them apart they are filled up together to eighths of a sequence, and where layers are
    compiled to a full micro-batch (probes/packed_rows.py). A length that has no such parts, and
    packed rows with a mask, are left as they are.
    """
    if config.packing and config.attention != "varlen":
        return None
    most, least = _LENGTHS
    if config.packing:
        most, least = _RECORDED_LENGTHS, 1
        if config.compile != "off":
            return config.seq_len * config.micro_batch
    elif config.compile != "off":
        grouped = config.group_by_length and config.compile == "layers"
        most, least = (_GROUPED_COMPILED_LENGTHS if grouped else 1), 1
    elif config.cuda_graph != "off":
        most, least = _RECORDED_LENGTHS, 1
    parts = [config.seq_len // n for n in range(most, least - 1, -1) if config.seq_len % n == 0]
    # Tensor cores take multiples of 8.
    return next((part for part in parts if part % 8 == 0), parts[0] if parts else None)


def lora_arguments(config: RunConfig, *, exclude: Sequence[str] = ()) -> dict[str, Any]:
    """Return the keyword arguments of peft's LoraConfig.

    Args:
        config: Has an adapter.
        exclude: Names of modules that "all-linear" would mean, but which cannot carry one.
    """
    shape = config.lora
    assert shape is not None
    return {
        "r": shape.r,
        "lora_alpha": shape.alpha,
        "lora_dropout": shape.dropout,
        "target_modules": shape.targets if isinstance(shape.targets, str) else list(shape.targets),
        "exclude_modules": list(exclude) or None,
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }


def dtype_name(config: RunConfig) -> str:
    """Return the name of the dtype the base weights (those not in 4 bits) are held in.

    Full fine-tuning in fp16 keeps fp32 weights where a GradScaler is used: it cannot unscale fp16
    gradients (torch/amp/grad_scaler.py, `_unscale_grads_`).
    """
    if config.precision == "bf16":
        return "bfloat16"
    if config.precision == "fp16" and not (config.method == "full" and config.trainer != "loop"):
        return "float16"
    return "float32"


def loaded_attention(config: RunConfig) -> str:
    """Return the attention that a model is loaded with, in transformers' words.

    That of packed rows takes its place when the step is built (`finetune.prepare_model`).
    """
    return "sdpa" if config.attention == "varlen" else config.attention


def quantization_arguments(config: RunConfig) -> dict[str, Any]:
    """Return the keyword arguments of transformers' BitsAndBytesConfig for method "qlora"."""
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": config.quant_type,
        "bnb_4bit_use_double_quant": config.double_quant,
        "bnb_4bit_compute_dtype": dtype_name(config),
    }


def loading_arguments(config: RunConfig, *, device: str) -> dict[str, Any]:
    """Return the keyword arguments of `from_pretrained`, the quantisation left out."""
    return {
        "dtype": dtype_name(config),
        "attn_implementation": loaded_attention(config),
        "device_map": {"": device},
        "use_safetensors": True,
    }
