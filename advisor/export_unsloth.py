"""Exports for Unsloth: a Python script around its FastLanguageModel and TRL's trainer.

Read in unsloth 2026.10.9: it replaces attention, RoPE, norms, MLP, LoRA layers and loss with code
of its own, compiles what it likes, and takes no other quantisation than nf4 with double
quantisation (models/loader.py). `use_gradient_checkpointing="unsloth"` holds checkpoints in host
memory.
"""

from __future__ import annotations

from typing import Any

from lora_advisor.advisor.export_data import loading, mapping
from lora_advisor.advisor.export_trl import _given as given
from lora_advisor.advisor.export_words import (
    NO_DATA,
    NO_GRAPH,
    ONE_PASS,
    Recipe,
    Rule,
    Target,
    call,
    literal,
    whole,
)
from lora_advisor.advisor.foreign_keys import foreign_keys, versions_of
from lora_advisor.advisor.user_arguments import training_of
from lora_advisor.probes import unsloth
from lora_advisor.probes.arguments import dtype_name, trl_arguments
from lora_advisor.probes.config import RunConfig

#: RunConfig's checkpointing in Unsloth's words.
CHECKPOINTING: dict[str, Any] = {**unsloth.CHECKPOINTING, "offload": "unsloth"}
#: Arguments of transformers 5.23 that the versions Unsloth takes do not have, or that it decides.
_LEFT_OUT = (
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
    "use_liger_kernel",
    "torch_compile",
    "use_cpu",
)


def _write(config: RunConfig, recipe: Recipe, asked: RunConfig) -> str:
    function, apply = mapping(recipe)
    known = set(foreign_keys()["unsloth"]["SFTConfig"])
    arguments = {
        key: value for key, value in training_of(config, recipe).items() if key not in _LEFT_OUT
    }
    arguments.update(gradient_checkpointing=CHECKPOINTING[config.checkpointing] is not False)
    arguments.update(given(trl_arguments(config)))
    unknown = sorted(set(arguments) - known)
    assert not unknown, unknown
    full = config.method == "full"
    loaded = {
        "max_seq_length": config.seq_len,
        "dtype": None,
        "load_in_4bit": config.method == "qlora",
        "full_finetuning": full,
        "use_gradient_checkpointing": CHECKPOINTING[config.checkpointing],
        **({"trust_remote_code": True} if recipe.trust_remote_code else {}),
    }
    parts = [
        "import unsloth  # noqa: F401  before trl and transformers, which it changes\n",
        "import torch\nfrom datasets import load_dataset\nfrom trl import SFTConfig, SFTTrainer\n",
        "from unsloth import FastLanguageModel\n",
        f"\nMODEL = {literal(recipe.model)}\nDATA = {literal(recipe.data or NO_DATA)}\n",
        f"\n\ndef make_arguments():\n    return {call('SFTConfig', arguments)}\n",
        function,
        "\n\ndef main():\n",
        "    model, tokenizer = FastLanguageModel.from_pretrained(\n        MODEL,\n",
        "".join(f"        {key}={literal(value)},\n" for key, value in loaded.items()).replace(
            "dtype=None", f"dtype=torch.{dtype_name(config)}"
        ),
        "    )\n",
        "" if full else _adapted(config),
        f"    rows = {loading(recipe)}\n",
        f"    {apply}\n" if apply else "",
        "    trainer = SFTTrainer(\n        model=model,\n        args=make_arguments(),\n"
        "        train_dataset=rows,\n        processing_class=tokenizer,\n    )\n",
        "    trainer.train()\n    trainer.save_model()\n",
        '\n\nif __name__ == "__main__":\n    main()\n',
    ]
    return "".join(parts)


def _adapted(config: RunConfig) -> str:
    shape = config.lora
    assert shape is not None
    names = unsloth.ALL_LINEAR if isinstance(shape.targets, str) else shape.targets
    arguments = {
        "r": shape.r,
        "lora_alpha": whole(shape.alpha),
        "lora_dropout": shape.dropout,
        "target_modules": list(names),
        "bias": "none",
        "use_gradient_checkpointing": CHECKPOINTING[config.checkpointing],
        "random_state": 0,
    }
    source = call("FastLanguageModel.get_peft_model", arguments)
    head, tail = source.split("(\n", 1)
    return f"    model = {head}(\n        model,\n{tail}\n"


def _rules(recipe: Recipe) -> list[Rule]:
    why = "Unsloth brings its own"
    return [
        NO_GRAPH,
        ONE_PASS,
        Rule(
            lambda c: c.trainer not in ("trl", unsloth.NAME),
            lambda c: {"trainer": "trl", "loss": "fused"},
            "The step is that of TRL's trainer with Unsloth's fused loss.",
        ),
        Rule(
            lambda c: c.checkpointing.startswith("every_"),
            lambda c: {"checkpointing": "full"},
            "Layers cannot be checkpointed every N-th: every layer is.",
        ),
        Rule(
            lambda c: c.kernels != "none",
            lambda c: {"kernels": "none"},
            f"Liger's kernels are not used: {why}.",
        ),
        Rule(
            lambda c: c.compile != "off",
            lambda c: {"compile": "off"},
            "Decoder layers are not compiled as planned: Unsloth compiles parts of its own choice.",
        ),
        Rule(
            lambda c: c.adapter == "fused",
            lambda c: {"adapter": "peft", "recompute": "layer"},
            f"The fused adapter is lora-advisor's own: {why}.",
        ),
        Rule(
            lambda c: c.embedding == "host",
            lambda c: {"embedding": "device"},
            "Unsloth decides by itself whether input embeddings go to host memory.",
        ),
        Rule(
            lambda c: c.fp32_upcast,
            lambda c: {"fp32_upcast": False},
            "There is no fp32 upcast: norms and embeddings stay in 16 bits.",
        ),
        Rule(
            lambda c: c.attention != "sdpa",
            lambda c: {"attention": "sdpa"},
            "The attention kernel cannot be chosen: Unsloth takes the fastest that is installed.",
        ),
        Rule(
            lambda c: c.method == "qlora" and (c.quant_type, c.double_quant) != ("nf4", True),
            lambda c: {"quant_type": "nf4", "double_quant": True},
            "The quantisation cannot be chosen: Unsloth's is nf4 with double quantisation.",
        ),
        Rule(
            lambda c: c.precision == "fp32",
            lambda c: {"precision": "bf16"},
            "fp32 is not what Unsloth's kernels are for: bf16 is written.",
        ),
    ]


def _notes(config: RunConfig, recipe: Recipe) -> list[str]:
    notes = []
    if config.trainer != unsloth.NAME:
        notes.append(
            "Unsloth's kernels and loss are its own: the plan's figures are not measured on this "
            "stack, and its memory is an upper bound at most."
        )
    if recipe.device != "cuda":
        notes.append("Unsloth needs a GPU; the plan is for a CPU.")
    return notes


UNSLOTH = Target(
    name="unsloth",
    versions=versions_of("unsloth"),
    suffix=".py",
    run="python {file}",
    rules=_rules,
    write=_write,
    notes=_notes,
    refuses=lambda config: (
        "scripts for Unsloth are written for stage sft alone; export stage dpo --to trl"
        if config.stage == "dpo"
        else None
    ),
)
