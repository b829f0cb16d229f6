"""Read a LLaMA-Factory YAML: ours or a user's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_advisor.advisor.export_llamafactory import ATTENTION
from lora_advisor.advisor.foreign import Imported, Reading, leftover, model_of, skip_adapter
from lora_advisor.advisor.foreign_irrelevant import is_irrelevant
from lora_advisor.advisor.foreign_keys import foreign_keys
from lora_advisor.probes.config import LoraShape, RunConfig
from lora_advisor.probes.errors import UsageError

#: Keys that decide memory or speed and are not honoured, and why.
_NOT_HONOURED = {
    "deepspeed": "one device without DeepSpeed is what is answered.",
    "fsdp": "one device without FSDP is what is answered.",
    "use_unsloth": "Unsloth's kernels are not modelled; transformers' are taken.",
    "use_dora": "DoRA is not modelled; more memory and time are needed.",
    "additional_target": "modules trained as a whole are not modelled; more memory is needed.",
    "pure_bf16": "taken as bf16 autocast; without it trained parameters would be fp32.",
    "upcast_layernorm": "norms in fp32 are not modelled: a few MiB.",
    "upcast_lmhead_output": "logits in fp32 are what the full loss makes of them anyway.",
    "auto_find_batch_size": "not modelled; it makes the batch smaller until it fits.",
    "use_v1_kernels": "LLaMA-Factory's own kernels are not modelled.",
    "gradient_checkpointing": "LLaMA-Factory goes by `disable_gradient_checkpointing` alone.",
}


def read_llamafactory(
    reading: Reading, marked: Mapping[str, Any], onto: RunConfig | None
) -> Imported:
    """Return the configuration of a LLaMA-Factory file.

    Raises:
        UsageError: A value is of the wrong kind, or asks for what is not known here.
    """
    stage = _stage(reading)
    method, quantised = _method(reading)
    liger = reading.flag("enable_liger_kernel") or reading.flag("use_liger_kernel")
    _packing(reading)
    strategy = reading.words("train_sampling_strategy", "random")
    trained: dict[str, Any] = {
        "trainer": "trl" if stage == "dpo" else "transformers",
        "loss": "fused" if liger or stage == "dpo" else "full",
        "kernels": "liger" if liger else "none",
    }
    config = RunConfig(
        model=model_of(reading.words("model_name_or_path"), marked),
        stage=stage,
        method=method,
        micro_batch=reading.whole("per_device_train_batch_size", 8),
        accumulation=reading.whole("gradient_accumulation_steps", 1),
        seq_len=reading.whole("cutoff_len", 2048),
        optimizer=reading.words("optim", "adamw_torch_fused"),
        precision=_precision(reading),
        checkpointing=_checkpointing(reading),
        attention=_attention(reading),
        lora=None if method == "full" else _lora(reading),
        compile="model" if reading.flag("torch_compile") else "off",
        allocator=str(marked.get("allocator", "default")),
        group_by_length=strategy == "group_by_length" and stage == "sft",
        **trained,
        **quantised,
    )
    if method == "full":
        skip_adapter(reading)
    reading.note_all(_NOT_HONOURED)
    known = foreign_keys()["llamafactory"]
    ignored = leftover(reading, known["keys"], is_irrelevant, f"LLaMA-Factory {known['version']}")
    return Imported(
        source="llamafactory", config=config, notes=tuple(reading.notes), ignored=ignored
    )


def _packing(reading: Reading) -> None:
    for key in ("neat_packing", "packing"):
        if reading.take(key) and not any("packing`" in note for note in reading.notes):
            reading.note(key, "full rows are what is answered, as packing makes them.")


def _stage(reading: Reading) -> str:
    stage = reading.take("stage", "sft")
    if stage in ("sft", "dpo"):
        if stage == "dpo":
            reading.note("stage", "the step is taken as that of TRL's DPOTrainer, whose loss is "
                         "computed in tiles; LLaMA-Factory's needs more memory.")  # fmt: skip
        return str(stage)
    if stage == "pt":
        reading.note("stage", "pt is taken as sft: the same step on other rows.")
        return "sft"
    raise UsageError(
        f"`{reading.where}`: `stage` must be sft, pt or dpo, but got {stage!r}: other stages are "
        "not known here."
    )


def _method(reading: Reading) -> tuple[str, dict[str, Any]]:
    kind = reading.take("finetuning_type", "lora")
    if kind not in ("lora", "full"):
        raise UsageError(
            f"`{reading.where}`: `finetuning_type` must be lora or full, but got {kind!r}: other "
            "methods are not known here."
        )
    bits = reading.take("quantization_bit")
    how = str(reading.take("quantization_method", "bnb")).lower()
    quantised = {
        "quant_type": reading.words("quantization_type", "nf4"),
        "double_quant": reading.flag("double_quantization", True),
    }
    if bits is None or kind == "full":
        return str(kind), {}
    if str(bits) == "4" and how in ("bnb", "bitsandbytes"):
        return "qlora", quantised
    if str(bits) == "4":
        reading.note("quantization_method", f"{how} is not modelled; bitsandbytes' 4 bits are "
                     "taken.")  # fmt: skip
        return "qlora", quantised
    reading.note("quantization_bit", f"{bits} bits are not modelled; 16-bit weights are taken.")
    return "lora", {}


def _precision(reading: Reading) -> str:
    pure = reading.flag("pure_bf16")
    bf16, fp16 = reading.flag("bf16"), reading.flag("fp16")
    return "bf16" if bf16 or pure else "fp16" if fp16 else "fp32"


def _checkpointing(reading: Reading) -> str:
    offload = reading.flag("use_unsloth_gc")
    if reading.flag("disable_gradient_checkpointing"):
        return "off"
    return "offload" if offload else "full"


def _attention(reading: Reading) -> str:
    name = reading.take("flash_attn", "auto")
    words = {theirs: ours for ours, theirs in ATTENTION.items()}
    if not isinstance(name, str):  # YAML's "off" and "on" among them
        raise reading.wrong("flash_attn", f"auto, {', '.join(words)}", name)
    if name == "auto":
        return "sdpa"
    if name not in words:
        reading.note("flash_attn", f"{name} is not modelled; flash_attention_2 is taken.")
    return words.get(str(name), "flash_attention_2")


def _lora(reading: Reading) -> LoraShape:
    rank = reading.whole("lora_rank", 8)
    named = reading.take("lora_target", "all")
    names = named if isinstance(named, list) else str(named).split(",")
    parts = tuple(str(name).strip() for name in names if str(name).strip())
    return LoraShape(
        r=rank,
        alpha=reading.number("lora_alpha", 2 * rank),
        dropout=reading.number("lora_dropout", 0.0),
        targets="all-linear" if parts == ("all",) else parts,
    )
