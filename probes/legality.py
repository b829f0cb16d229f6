"""Which knobs of a configuration go with each other; each refusal names the knob and the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_advisor.probes.errors import UsageError

if TYPE_CHECKING:
    from lora_advisor.probes.config import RunConfig


def check_combinations(config: RunConfig) -> None:
    """Refuse knobs that do not go with each other.

    Raises:
        UsageError: It names the knob, what came, and why it cannot be.
    """
    if config.method == "full":
        if config.lora is not None:
            raise UsageError('`lora` must be null with method "full", which trains no adapter.')
        if config.fp32_upcast:
            raise UsageError(
                '`fp32_upcast` must be false with method "full": '
                "prepare_model_for_kbit_training freezes the weights that are to be trained."
            )
        if config.embedding == "host":
            raise UsageError(
                '`embedding` must be "device" with method "full", which trains the embeddings.'
            )
    if not config.is_buildable:
        _check_foreign(config)
    if config.adapter == "fused":
        _check_fused_adapter(config)
    if config.stage == "dpo":
        _check_preference(config)
    if config.trainer == "trl" and config.loss == "full":
        raise UsageError(
            '`loss` must be "fused" or "one_pass" with trainer "trl": SFTTrainer (TRL 1.15 and '
            'later) always computes it in tiles. Use trainer "transformers" for "full".'
        )
    if config.loss == "one_pass":
        _check_one_pass(config)
    if config.recompute == "needed":
        _check_recompute(config)
    if config.cuda_graph != "off":
        _check_cuda_graph(config)
    if (
        config.trainer in ("transformers", "loop")
        and config.loss == "fused"
        and config.kernels != "liger"
    ):
        raise UsageError(
            f'`loss` "fused" needs kernels "liger" with trainer {config.trainer!r}, which has no '
            'fused loss of its own; use trainer "trl" or loss "full".'
        )
    if config.packing and config.trainer != "trl":
        raise UsageError(
            f'`packing` must be false with trainer {config.trainer!r}: only "trl" packs rows.'
        )
    if config.packing and config.group_by_length:
        raise UsageError(
            "`group_by_length` must be false with `packing`, which leaves no padding to save."
        )
    if config.attention == "varlen" and not config.packing:
        raise UsageError(
            '`attention` must be "sdpa" where rows are not packed, not "varlen": that keeps '
            "documents of one sequence apart; add --packing."
        )
    if config.attention == "flash_attention_2" and config.precision == "fp32":
        raise UsageError(
            '`attention` "flash_attention_2" needs precision "bf16" or "fp16": the kernel has '
            "no fp32 form."
        )


def _check_foreign(config: RunConfig) -> None:
    quantised = config.method == "qlora"
    for name, wanted in (
        ("quant_type", "nf4" if quantised else None),
        ("double_quant", True if quantised else None),
        ("stage", "sft"),
        ("attention", "sdpa"),
        ("kernels", "none"),
        ("loss", "fused"),
        ("adapter", "peft"),
        ("compile", "off"),
        ("embedding", "device"),
        ("recompute", "layer"),
        ("cuda_graph", "off"),
        ("fp32_upcast", False),
    ):
        if getattr(config, name) != wanted:
            raise UsageError(
                f"`{name}` must be {wanted} with trainer {config.trainer!r}, whose step is its "
                f"own, but got {getattr(config, name)!r}."
            )
    if config.method == "full":
        raise UsageError(
            f'`method` must be "lora" or "qlora" with trainer {config.trainer!r}, which trains '
            "adapters here."
        )
    if config.checkpointing not in ("off", "full", config.trainer):
        raise UsageError(
            f'`checkpointing` must be "off", "full" or {config.trainer!r} with trainer '
            f"{config.trainer!r}, but got {config.checkpointing!r}."
        )


def _check_one_pass(config: RunConfig) -> None:
    foreign = config.trainer != "trl"
    instead = '"fused" or "full"' if foreign else '"fused"'
    for name, wrong, why in (
        ("trainer", foreign, "it is a trainer of TRL's that computes it"),
        ("stage", config.stage != "sft", "DPO asks for more than the targets' probabilities"),
        (
            "method",
            config.method == "full",
            "the head's weights are trained as well",
        ),
    ):
        if wrong:
            raise UsageError(
                f"`loss` must be {instead} with {name} {getattr(config, name)!r}, not "
                f'"one_pass": {why}.'
            )


def _check_recompute(config: RunConfig) -> None:
    if config.adapter != "fused":
        raise UsageError(
            f'`recompute` must be "layer" with adapter {config.adapter!r}, not "needed": it is '
            "the fused adapter that ends early."
        )


def _check_cuda_graph(config: RunConfig) -> None:
    if config.lora is not None and config.lora.dropout > 0:
        raise UsageError(
            f'`cuda_graph` must be "off" with `lora.dropout` {config.lora.dropout:g}: a '
            "checkpointed layer reads the generator's state, which cannot be recorded."
        )
    inside = config.optimizer in ("lomo", "adalomo") or config.optimizer.endswith("_layerwise")
    for name, wrong, why in (
        ("loss", config.loss != "one_pass", "other losses read values back within a micro-batch"),
        (
            "packing",
            config.packing and config.attention != "varlen",
            'packed rows begin elsewhere in every micro-batch; attention "varlen" takes that',
        ),
        ("precision", config.precision == "fp16", "its scaler reads the gradients back"),
        ("compile", config.compile == "model", "a compiled model has graphs of its own"),
        ("checkpointing", config.checkpointing == "offload", "what is offloaded moves about"),
        ("optimizer", inside, "it steps within the backward pass"),
    ):
        if wrong:
            raise UsageError(
                f'`cuda_graph` must be "off" with {name} {getattr(config, name)!r}: {why}.'
            )


def _check_fused_adapter(config: RunConfig) -> None:
    if config.lora is None:
        raise UsageError('`adapter` must be "peft" with method "full", which trains none.')
    if config.lora.dropout:
        raise UsageError(
            '`adapter` "fused" needs `lora.dropout` 0, for it has no dropout, but got '
            f'{config.lora.dropout!r}; use adapter "peft".'
        )
    if config.trainer not in ("trl", "transformers"):
        raise UsageError(
            f'`adapter` must be "peft" with trainer {config.trainer!r}: "fused" multiplies as '
            'autocast does, which only "trl" and "transformers" use.'
        )


def _check_preference(config: RunConfig) -> None:
    for name, wanted, why in (
        ("trainer", "trl", "it is TRL's DPOTrainer that trains on pairs"),
        ("packing", False, "TRL does not pack pairs"),
        ("group_by_length", False, "Trainer groups by `input_ids`, which pairs do not have"),
    ):
        if getattr(config, name) != wanted:
            raise UsageError(
                f'`{name}` must be {wanted} with stage "dpo" ({why}), but got '
                f"{getattr(config, name)!r}."
            )
    if config.method == "full":
        raise UsageError(
            '`method` must be "lora" or "qlora" with stage "dpo": the reference is the model '
            "without its adapter, and full fine-tuning would need a second model."
        )
