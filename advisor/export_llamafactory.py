"""Exports for LLaMA-Factory: one YAML file.

What LLaMA-Factory does that decides memory, read in llamafactory 0.9.5: layers are checkpointed
unless `disable_gradient_checkpointing` (model/model_utils/checkpointing.py; the reentrant way
unless told otherwise); trained parameters are fp32 (model/adapter.py, `init_adapter`); nothing else
is cast up; the SFT loss is transformers' own, of all logits, unless Liger's kernels bring a fused
one.
"""

from __future__ import annotations

import json
from typing import Any

from lora_advisor.advisor.export_axolotl import common_rules
from lora_advisor.advisor.export_data import PAIRS
from lora_advisor.advisor.export_trl import loss_rules
from lora_advisor.advisor.export_words import Recipe, Rule, Target, as_yaml, comment, whole
from lora_advisor.advisor.foreign_keys import versions_of
from lora_advisor.advisor.user_arguments import training_of
from lora_advisor.probes.config import RunConfig

#: RunConfig's words for attention, in LLaMA-Factory's (extras/constants.py, AttentionFunction).
ATTENTION = {"sdpa": "sdpa", "eager": "disabled", "flash_attention_2": "fa2"}
#: The data set's name in dataset_info.json.
_DATASET = "lora_advisor_data"


def _write(config: RunConfig, recipe: Recipe, asked: RunConfig) -> str:
    training = training_of(config, recipe)
    values: dict[str, Any] = {
        "model_name_or_path": recipe.model,
        "trust_remote_code": recipe.trust_remote_code,
        "stage": config.stage,
        "do_train": True,
        **_adapter(config),
        "dataset": _DATASET,
        "cutoff_len": config.seq_len,
        "packing": asked.packing,
        "neat_packing": asked.packing,
        "per_device_train_batch_size": config.micro_batch,
        "gradient_accumulation_steps": config.accumulation,
        "num_train_epochs": recipe.epochs,
        "learning_rate": training["learning_rate"],
        "lr_scheduler_type": training["lr_scheduler_type"],
        "warmup_steps": training["warmup_steps"],
        "optim": config.optimizer,
        "max_grad_norm": training["max_grad_norm"],
        "train_sampling_strategy": "group_by_length" if config.group_by_length else "random",
        "bf16": config.precision == "bf16",
        "fp16": config.precision == "fp16",
        "disable_gradient_checkpointing": config.checkpoint_every is None,
        "use_reentrant_gc": False,
        "use_unsloth_gc": config.checkpointing == "offload",
        "flash_attn": ATTENTION[config.attention],
        "enable_liger_kernel": config.kernels == "liger",
        "torch_compile": config.compile == "model",
        "use_cpu": recipe.device != "cuda",
        "logging_steps": training["logging_steps"],
        "save_steps": training["save_steps"],
        "output_dir": training["output_dir"],
        "seed": training["seed"],
        "report_to": "none",
    }
    return _data_comment(recipe, config) + as_yaml(values)


def _adapter(config: RunConfig) -> dict[str, Any]:
    shape = config.lora
    if shape is None:
        return {"finetuning_type": "full"}
    targets = "all" if isinstance(shape.targets, str) else ",".join(shape.targets)
    values: dict[str, Any] = {
        "finetuning_type": "lora",
        "lora_rank": shape.r,
        "lora_alpha": whole(shape.alpha),
        "lora_dropout": shape.dropout,
        "lora_target": targets,
    }
    if config.method == "qlora":
        values.update(
            quantization_bit=4,
            quantization_method="bnb",
            quantization_type=config.quant_type,
            double_quantization=config.double_quant,
        )
    return values


def _data_comment(recipe: Recipe, config: RunConfig) -> str:
    """Return what must stand in dataset_info.json, for LLaMA-Factory finds data only there."""
    if recipe.data is None:
        return comment(f"`dataset` must name an entry of dataset_info.json: replace {_DATASET}.")
    entry: dict[str, Any] = {"file_name": recipe.data}
    if recipe.data.startswith("hub:"):
        name, *more = recipe.data.removeprefix("hub:").split(":")
        entry = {"hf_hub_url": name, **({"subset": more[0]} if more and more[0] else {})}
    if config.stage == "dpo":
        entry["ranking"] = True
        entry["columns"] = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    elif recipe.shape == "messages":
        tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user",
                "assistant_tag": "assistant", "system_tag": "system"}  # fmt: skip
        entry |= {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    elif recipe.shape == "ShareGPT":
        entry["formatting"] = "sharegpt"
    elif recipe.shape in PAIRS or recipe.shape == "prompt/completion":
        question, answer = PAIRS.get(recipe.shape, ("prompt", "completion"))
        entry["columns"] = {"prompt": question, "response": answer}
        if recipe.shape == "instruction":
            entry["columns"]["query"] = "input"
    return comment(
        "`dataset` must name an entry of data/dataset_info.json, such as\n"
        f"{json.dumps({_DATASET: entry})}"
    )


def _unpacked(config: RunConfig) -> str:
    return "sdpa" if config.attention == "varlen" else config.attention


def _rules(recipe: Recipe) -> list[Rule]:
    return [
        *common_rules("LLaMA-Factory"),
        Rule(
            lambda c: c.compile == "layers",
            lambda c: {"compile": "off"},
            "Decoder layers cannot be compiled one by one: nothing is compiled.",
        ),
        Rule(
            lambda c: c.stage == "sft" and c.packing and c.trainer == "trl",
            # The file packs all the same; only our words for the trainer's step have no packing.
            lambda c: {"packing": False, "attention": _unpacked(c)},
            "Rows are packed by LLaMA-Factory's own `neat_packing`, not TRL's: as many tokens in a "
            "step, another order of rows.",
        ),
        *loss_rules(recipe, "LLaMA-Factory"),
        Rule(
            lambda c: c.kernels == "liger" and c.loss == "full",
            lambda c: {"loss": "fused"},
            "The loss is fused: LLaMA-Factory's Liger kernels cannot be had without theirs.",
        ),
        Rule(
            lambda c: c.stage == "sft" and c.trainer != "transformers",
            lambda c: {"trainer": "transformers"},
            "The step is that of transformers' Trainer, which LLaMA-Factory's is made of.",
        ),
    ]


def _notes(config: RunConfig, recipe: Recipe) -> list[str]:
    notes = []
    if config.stage == "dpo":
        notes.append(
            "LLaMA-Factory's DPO step computes all logits of both answers, where TRL's computes "
            "them in tiles: not modelled, and not measured on this stack."
        )
    if config.method == "full" and config.precision != "fp32":
        notes.append(
            "LLaMA-Factory trains all parameters in fp32, where bf16 weights were planned: 2 bytes "
            "more for each weight, its gradient and AdamW's states twice as large."
        )
    if config.method == "qlora" and config.trainer == "trl" and config.precision == "bf16":
        notes.append(
            "LLaMA-Factory holds adapters, their gradients and AdamW's states in fp32, where TRL "
            "has those of a 4-bit model in bf16: 8 bytes more for each trained parameter."
        )
    return notes


LLAMAFACTORY = Target(
    name="llamafactory",
    versions=versions_of("llamafactory"),
    suffix=".yaml",
    run="llamafactory-cli train {file}",
    rules=_rules,
    write=_write,
    notes=_notes,
)
