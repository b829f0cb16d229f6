"""Read an Axolotl YAML: ours or a user's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_advisor.advisor.export_axolotl import CUT, LIGER
from lora_advisor.advisor.foreign import Imported, Reading, leftover, model_of, skip_adapter
from lora_advisor.advisor.foreign_irrelevant import is_irrelevant
from lora_advisor.advisor.foreign_keys import foreign_keys
from lora_advisor.probes.config import OPTIMIZERS, LoraShape, RunConfig
from lora_advisor.probes.errors import UsageError

#: Flags of older files, and what they mean now (utils/schemas/enums.py, LEGACY_ATTN_FLAG_TO_IMPL).
_LEGACY = {
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "eager_attention": "eager",
    "xformers_attention": "xformers",
    "flex_attention": "flex_attention",
    "sage_attention": "sage",
}
#: Keys that decide memory or speed and are not honoured, and why.
_NOT_HONOURED = {
    "lora_mlp_kernel": "Axolotl's LoRA kernels are not modelled; peft's layers are taken.",
    "lora_qkv_kernel": "Axolotl's LoRA kernels are not modelled; peft's layers are taken.",
    "lora_o_kernel": "Axolotl's LoRA kernels are not modelled; peft's layers are taken.",
    "lora_modules_to_save": "modules trained as a whole are not modelled; more memory is needed.",
    "peft_use_dora": "DoRA is not modelled; more memory and time are needed.",
    "deepspeed": "one device without DeepSpeed is what is answered.",
    "fsdp_config": "one device without FSDP is what is answered.",
    "selective_checkpointing": "layers are taken to be checkpointed whole.",
    "layer_offloading": "weights are taken to stay on the device, which needs more memory.",
    "chunked_cross_entropy": "the logits of all tokens are held all the same: taken as full loss.",
    "tiled_mlp": "not modelled; the answer is for a training without it, which needs more memory.",
    "auto_find_batch_size": "not modelled; it makes the batch smaller until it fits.",
    "batch_flattening": "padding-free batches are not modelled; full rows are what is answered.",
    "use_kernels": "kernels of the hub are not modelled.",
    "fp8": "fp8 is not modelled; the answer is for the 16-bit precision.",
}


def read_axolotl(reading: Reading, marked: Mapping[str, Any], onto: RunConfig | None) -> Imported:
    """Return the configuration of an Axolotl file.

    Raises:
        UsageError: A value is of the wrong kind, or asks for what is not known here.
    """
    stage = _stage(reading)
    method, quantised = _method(reading)
    losses = _loss(reading, stage)
    packing = reading.flag("sample_packing")
    if packing and (losses["trainer"] != "trl" or stage == "dpo"):
        packing = False
        reading.note("sample_packing", "full rows are what is answered, as packing makes them.")
    micro, accumulation = _batch(reading)
    config = RunConfig(
        model=model_of(reading.words("base_model"), marked),
        stage=stage,
        method=method,
        micro_batch=micro,
        accumulation=accumulation,
        seq_len=reading.whole("sequence_len", 512),
        optimizer=_optimizer(reading),
        precision=_precision(reading),
        checkpointing=_checkpointing(reading),
        attention=_attention(reading),
        lora=None if method == "full" else _lora(reading),
        compile=_compile(reading),
        allocator=str(marked.get("allocator", "expandable_segments")),
        packing=packing,
        group_by_length=reading.flag("group_by_length") and not packing and stage == "sft",
        **losses,
        **quantised,
    )
    if method == "full":
        skip_adapter(reading)
    reading.note_all(_NOT_HONOURED)
    known = foreign_keys()["axolotl"]
    ignored = leftover(reading, known["keys"], is_irrelevant, f"Axolotl {known['version']}")
    return Imported(source="axolotl", config=config, notes=tuple(reading.notes), ignored=ignored)


def _stage(reading: Reading) -> str:
    kind = reading.take("rl")
    if kind is None or kind is False:
        return "sft"
    if kind != "dpo":
        raise UsageError(
            f"`{reading.where}`: `rl` must be dpo or left out, but got {kind!r}: other stages are "
            "not known here."
        )
    reading.note("rl", "the step is taken as that of TRL's DPOTrainer.")
    return "dpo"


def _method(reading: Reading) -> tuple[str, dict[str, Any]]:
    adapter = reading.take("adapter") or None
    four, eight = reading.flag("load_in_4bit"), reading.flag("load_in_8bit")
    if adapter not in (None, "lora", "qlora"):
        raise UsageError(
            f"`{reading.where}`: `adapter` must be lora, qlora or left out, but got {adapter!r}."
        )
    if eight:
        reading.note("load_in_8bit", "8-bit weights are not modelled; 16-bit ones are taken, "
                     "which need more memory.")  # fmt: skip
    if adapter is None:
        if four:
            reading.note("load_in_4bit", "without an adapter all parameters train, in 16 bits.")
        return "full", {}
    kwargs = reading.take("bnb_config_kwargs") or {}
    if adapter != "qlora" and not four:
        return "lora", {}
    if not isinstance(kwargs, Mapping):
        raise reading.wrong("bnb_config_kwargs", "a mapping", kwargs)
    return "qlora", {
        "quant_type": kwargs.get("bnb_4bit_quant_type", "nf4"),
        "double_quant": kwargs.get("bnb_4bit_use_double_quant", True),
    }


def _batch(reading: Reading) -> tuple[int, int]:
    micro = reading.whole("micro_batch_size", 1)
    if reading.take("gradient_accumulation_steps") is None and reading.take("batch_size"):
        return micro, max(1, reading.whole("batch_size") // max(1, micro))
    reading.seen.add("batch_size")
    return micro, reading.whole("gradient_accumulation_steps", 1)


def _optimizer(reading: Reading) -> str:
    name = reading.words("optimizer", "adamw_torch_fused")
    if name in OPTIMIZERS:
        return name
    reading.note("optimizer", f"{name} is Axolotl's own; adamw_torch_fused is taken.")
    return "adamw_torch_fused"


def _precision(reading: Reading) -> str:
    reading.seen |= {"bf16", "fp16", "bfloat16", "float16", "float32"}
    values = reading.values
    if values.get("bfloat16") or values.get("bf16") in (True, "true", "full"):
        return "bf16"
    if values.get("fp16") or values.get("float16"):
        return "fp16"
    if values.get("bf16", "auto") == "auto":  # what the card can do: bf16 since Ampere
        return "fp32" if values.get("float32") else "bf16"
    return "fp32"


def _checkpointing(reading: Reading) -> str:
    asked = reading.take("gradient_checkpointing", False)
    offload = reading.take("activation_offloading", False)
    if not asked:
        return "off"
    return "offload" if offload or asked in ("offload", "offload_disk") else "full"


def _attention(reading: Reading) -> str:
    name = reading.take("attn_implementation")
    for flag, meaning in _LEGACY.items():
        if reading.take(flag) and name is None:
            name = meaning
    if name is None or name in ("sdpa", "eager", "flash_attention_2"):
        return str(name or "sdpa")
    taken = "flash_attention_2" if "flash" in str(name) else "sdpa"
    reading.note("attn_implementation", f"{name} is not modelled; {taken} is taken.")
    return taken


def _compile(reading: Reading) -> str:
    regional = reading.take("torch_compile_regional")
    if not reading.take("torch_compile"):
        return "off"
    return "layers" if regional else "model"


def _loss(reading: Reading, stage: str) -> dict[str, Any]:
    """Return trainer, kernels and loss, which are one thing: who computes the loss, and how."""
    plugins = reading.take("plugins") or []
    if not isinstance(plugins, list):
        raise reading.wrong("plugins", "a list", plugins)
    cut = reading.flag("cut_cross_entropy", CUT in plugins)
    liger = [key for key in reading.values if key.startswith("liger_") and reading.take(key)]
    kernels = "liger" if LIGER in plugins and liger else "none"
    unknown = [str(name) for name in plugins if name not in (CUT, LIGER)]
    if unknown:
        reading.note("plugins", f"what {', '.join(unknown)} does is not known here.")
    if stage == "dpo":
        return {"trainer": "trl", "kernels": kernels, "loss": "fused"}
    if cut:  # it holds no logits either; TRL's fused loss is what is known here
        return {"trainer": "trl", "kernels": kernels, "loss": "fused"}
    tiled = kernels == "liger" and reading.flag("liger_fused_linear_cross_entropy")
    loss = "fused" if tiled else "full"
    return {"trainer": "transformers", "kernels": kernels, "loss": loss}


def _lora(reading: Reading) -> LoraShape:
    rank = reading.whole("lora_r")
    linear = reading.flag("lora_target_linear")
    named = reading.take("lora_target_modules")
    targets: str | tuple[str, ...]
    if linear or named == "all-linear":
        targets = "all-linear"
        if isinstance(named, list):
            reading.note("lora_target_modules", "all linear layers are taken, these among them.")
    elif isinstance(named, list):
        targets = tuple(map(str, named))
    elif named is None:
        targets = ("q_proj", "v_proj")
        reading.note("lora_target_modules", "not given; q_proj and v_proj are taken, peft's usual.")
    else:
        targets = "all-linear"
        reading.note("lora_target_modules", f"{named!r} is a pattern; all linear layers are taken.")
    return LoraShape(
        r=rank,
        alpha=reading.number("lora_alpha", 8),
        dropout=reading.number("lora_dropout", 0.0),
        targets=targets,
    )
