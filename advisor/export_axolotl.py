"""Exports for Axolotl: one YAML file.

What Axolotl does that decides memory, read in axolotl 0.21.0: the base of `adapter: qlora` is nf4
with double quantisation (loaders/model.py, `_set_quantization_config`; `bnb_config_kwargs` changes
it); with an adapter, norms and embeddings go back to 16 bits after prepare_model_for_kbit_training
(`should_convert_embedding_dtypes`), so there is no upcast; PYTORCH_ALLOC_CONF becomes
expandable_segments:True unless it is set (utils/__init__.py).
"""

from __future__ import annotations

from typing import Any

from lora_advisor.advisor.export_data import PAIRS
from lora_advisor.advisor.export_words import (
    NO_DATA,
    NO_GRAPH,
    ONE_PASS,
    VARLEN,
    Recipe,
    Rule,
    Target,
    as_yaml,
    whole,
)
from lora_advisor.advisor.foreign_keys import versions_of
from lora_advisor.advisor.user_arguments import training_of
from lora_advisor.probes.config import RunConfig

LIGER = "axolotl.integrations.liger.LigerPlugin"
CUT = "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"
#: Liger's kernels that transformers' `use_liger_kernel` sets too.
LIGER_KERNELS = ("liger_rope", "liger_rms_norm", "liger_glu_activation", "liger_layer_norm")


def _write(config: RunConfig, recipe: Recipe, asked: RunConfig) -> str:
    training = training_of(config, recipe)
    values: dict[str, Any] = {
        "base_model": recipe.model,
        **({"trust_remote_code": True} if recipe.trust_remote_code else {}),
        **_adapter(config),
        "datasets": [_data(recipe, config)],
        "val_set_size": 0.0,
        "sequence_len": config.seq_len,
        "excess_length_strategy": "truncate",
        "sample_packing": asked.packing,
        "eval_sample_packing": False,
        "pad_to_sequence_len": config.compile != "off" and not asked.packing,
        "group_by_length": config.group_by_length,
        "micro_batch_size": config.micro_batch,
        "gradient_accumulation_steps": config.accumulation,
        "num_epochs": recipe.epochs,
        "learning_rate": training["learning_rate"],
        "lr_scheduler": training["lr_scheduler_type"],
        "warmup_steps": training["warmup_steps"],
        "optimizer": config.optimizer,
        "max_grad_norm": training["max_grad_norm"],
        "bf16": config.precision == "bf16",
        "fp16": config.precision == "fp16",
        "tf32": False,
        **_memory(config),
        "attn_implementation": config.attention,
        **_kernels(config),
        **({"rl": "dpo"} if config.stage == "dpo" else {}),
        "logging_steps": training["logging_steps"],
        "save_steps": training["save_steps"],
        "output_dir": training["output_dir"],
        "seed": training["seed"],
    }
    return as_yaml(values)


def _adapter(config: RunConfig) -> dict[str, Any]:
    shape = config.lora
    if shape is None:
        return {"load_in_4bit": False}
    values: dict[str, Any] = {
        "adapter": config.method,
        "load_in_4bit": config.method == "qlora",
        "lora_r": shape.r,
        "lora_alpha": whole(shape.alpha),
        "lora_dropout": shape.dropout,
    }
    if isinstance(shape.targets, str):
        values["lora_target_linear"] = True
    else:
        values["lora_target_modules"] = list(shape.targets)
    if config.method == "qlora":
        values["bnb_config_kwargs"] = {
            "bnb_4bit_quant_type": config.quant_type,
            "bnb_4bit_use_double_quant": config.double_quant,
        }
    # Axolotl's own LoRA kernels are another step than the planned one.
    return {**values, "lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False}


def _memory(config: RunConfig) -> dict[str, Any]:
    values: dict[str, Any] = {"gradient_checkpointing": config.checkpoint_every is not None}
    if config.checkpoint_every is not None:
        values["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    values["activation_offloading"] = (
        "hidden_states" if config.checkpointing == "offload" else False
    )
    return values


def _kernels(config: RunConfig) -> dict[str, Any]:
    plugins, values = [], {}
    if config.kernels == "liger":
        plugins.append(LIGER)
        values.update(dict.fromkeys(LIGER_KERNELS, True))
        values["liger_fused_linear_cross_entropy"] = (
            config.loss == "fused" and config.trainer == "transformers"
        )
    if config.loss == "fused" and config.trainer == "trl" and config.stage == "sft":
        plugins.append(CUT)
        values["cut_cross_entropy"] = True
    values["torch_compile"] = config.compile != "off"
    if config.compile == "layers":
        values["torch_compile_regional"] = True
    return {**({"plugins": plugins} if plugins else {}), **values}


def _data(recipe: Recipe, config: RunConfig) -> dict[str, Any]:
    path = recipe.data or NO_DATA
    hub = path.startswith("hub:")
    place: dict[str, Any] = {"path": path}
    if hub:
        name, *more = path.removeprefix("hub:").split(":")
        place = {"path": name, **({"name": more[0]} if more and more[0] else {})}
        place["split"] = more[1] if len(more) > 1 else "train"
    elif not path.lower().endswith((".csv", ".parquet", ".txt")):
        place["ds_type"] = "json"
    if config.stage == "dpo":
        return {**place, "type": "chat_template.default"}
    shape = recipe.shape
    if shape == "instruction":
        return {**place, "type": "alpaca"}
    if shape in ("text", "content"):
        return {**place, "type": "completion", "field": shape}
    if shape in PAIRS or shape == "prompt/completion":
        question, answer = PAIRS.get(shape, ("prompt", "completion"))
        form = {"field_instruction": question, "field_output": answer, "format": "{instruction}"}
        return {**place, "type": {**form, "no_input_format": "{instruction}"}}
    if shape == "ShareGPT":
        names = {"role": "from", "content": "value"}
        messages = {"field_messages": "conversations", "message_property_mappings": names}
        return {**place, "type": "chat_template", **messages}
    return {**place, "type": "chat_template"}


def common_rules(name: str) -> list[Rule]:
    """Return what neither Axolotl nor LLaMA-Factory can express."""
    return [
        NO_GRAPH,
        ONE_PASS,
        Rule(
            lambda c: c.checkpointing == "unsloth",
            lambda c: {"trainer": "trl", "loss": "fused", "checkpointing": "offload"},
            f"Unsloth's kernels are not there: {name}'s own step is written.",
        ),
        Rule(
            lambda c: c.checkpointing.startswith("every_"),
            lambda c: {"checkpointing": "full"},
            f"Layers cannot be checkpointed in part: {name} checkpoints every layer.",
        ),
        Rule(
            lambda c: c.adapter == "fused",
            lambda c: {"adapter": "peft", "recompute": "layer"},
            "The fused adapter is lora-advisor's own: peft's layers multiply instead.",
        ),
        Rule(
            lambda c: c.embedding == "host",
            lambda c: {"embedding": "device"},
            f"Input embeddings cannot be held in host memory: {name} keeps them on the card.",
        ),
        Rule(
            lambda c: c.fp32_upcast,
            lambda c: {"fp32_upcast": False},
            f"There is no fp32 upcast: {name} keeps norms and embeddings in 16 bits.",
        ),
        Rule(
            lambda c: c.lora is not None and not float(c.lora.alpha).is_integer(),
            lambda c: {"lora": _whole_alpha(c)},
            f"`lora_alpha` must be a whole number in {name}: the nearest is written.",
        ),
    ]


def _whole_alpha(config: RunConfig) -> Any:
    from dataclasses import replace

    assert config.lora is not None
    return replace(config.lora, alpha=max(1, round(config.lora.alpha)))


def _rules(recipe: Recipe) -> list[Rule]:
    return [
        *common_rules("Axolotl"),
        *VARLEN,
        Rule(
            lambda c: c.trainer not in ("trl", "transformers"),
            lambda c: (
                {"trainer": "transformers"} if c.loss == "full" or c.kernels == "liger"
                else {"trainer": "trl"}
            ),
            "The step is that of transformers' Trainer, which Axolotl's is made of.",
        ),
    ]  # fmt: skip


def _notes(config: RunConfig, recipe: Recipe) -> list[str]:
    notes = []
    if config.stage == "dpo":
        notes.append(
            "Axolotl's DPO step is that of TRL 1.14.1, not of the TRL that was planned with: "
            "not measured on this stack."
        )
    elif config.loss == "fused" and config.trainer == "trl":
        notes.append(
            "TRL's fused loss is written as Cut Cross-Entropy (needs its package and an Ampere GPU "
            "or newer), which holds no logits either; its speed is not measured here."
        )
    if config.method == "qlora" and config.trainer == "trl" and config.precision == "bf16":
        notes.append(
            "Axolotl holds adapters, their gradients and AdamW's states in fp32, where TRL has "
            "those of a 4-bit model in bf16: 8 bytes more for each trained parameter."
        )
    if config.compile == "layers" and config.checkpoint_every is not None:
        notes.append(
            "Axolotl advises against torch_compile_regional with checkpointing on torch 2.14."
        )
    return notes


AXOLOTL = Target(
    name="axolotl",
    versions=versions_of("axolotl"),
    suffix=".yaml",
    run="axolotl train {file}",
    rules=_rules,
    write=_write,
    notes=_notes,
)
