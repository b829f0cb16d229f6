"""Exports for TRL and for plain transformers: a Python script that runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_advisor.advisor.export_data import loading, mapping
from lora_advisor.advisor.export_words import (
    NO_DATA,
    NO_GRAPH,
    ONE_PASS,
    Recipe,
    Rule,
    Target,
    call,
    literal,
    quoted,
)
from lora_advisor.advisor.script_parts import (
    COMPILE,
    FULL_PRECISION,
    PADDING,
    TOKENS,
    UPCAST,
    USE_NO_MASK,
    WITHOUT_MASK,
)
from lora_advisor.advisor.user_arguments import training_of
from lora_advisor.probes.arguments import (
    loading_arguments,
    lora_arguments,
    padding_multiple,
    quantization_arguments,
    trl_arguments,
)
from lora_advisor.probes.config import RunConfig

#: The oldest versions that know every argument that is written; pyproject.toml asks for them too.
TRL_VERSIONS = {"trl": "1.16", "transformers": "5.23", "peft": "0.21", "bitsandbytes": "0.50"}
PLAIN_VERSIONS = {"transformers": "5.23", "peft": "0.21", "bitsandbytes": "0.50"}


def _write_trl(config: RunConfig, recipe: Recipe, asked: RunConfig) -> str:
    pairs = config.stage == "dpo"
    made, trainer = ("DPOConfig", "DPOTrainer") if pairs else ("SFTConfig", "SFTTrainer")
    libraries = [("trl", made)]
    if config.cuda_graph != "off":
        trainer = "GraphTrainer"
        libraries.append(("lora_advisor.probes.graph_trainer", trainer))
    elif config.loss == "one_pass":
        trainer = "OnePassTrainer"
        libraries.append(("lora_advisor.probes.one_pass_trainer", trainer))
    else:
        libraries.append(("trl", trainer))
    function, apply = ("", "") if pairs else mapping(recipe)
    padded = not config.packing and config.cuda_graph == "off"  # whose trainer does it itself
    function += WITHOUT_MASK if padded else ""
    arguments = {**training_of(config, recipe), **_given(trl_arguments(config))}
    body = [
        USE_NO_MASK.lstrip("\n") if padded else "",
        f"    rows = {loading(recipe)}\n",
        f"    {apply}\n" if apply else "",
        f"    trainer = {trainer}(\n        model=model,\n        args=arguments,\n"
        "        train_dataset=rows,\n        processing_class=tokenizer,\n",
        "" if config.method == "full" else "        peft_config=make_lora(),\n",
        "    )\n",
        FULL_PRECISION.lstrip("\n") if config.precision == "fp16" else "",
        _fill_up(config) if config.attention == "varlen" else "",
    ]
    return _script(config, recipe, made, arguments, libraries, function, "".join(body))


def _fill_up(config: RunConfig) -> str:
    return f"    fill_up(trainer, {config.seq_len}, {padding_multiple(config)})\n"


def _write_plain(config: RunConfig, recipe: Recipe, asked: RunConfig) -> str:
    function, apply = mapping(recipe)
    multiple = padding_multiple(config)
    padded = f", pad_to_multiple_of={multiple}" if multiple else ""
    adapted = ""
    if config.method != "full":
        adapted = "    model = get_peft_model(model, make_lora())\n"
        if config.checkpoint_every is not None:
            adapted += "    model.enable_input_require_grads()\n"
    body = [
        f"    rows = {loading(recipe)}\n",
        f"    {apply}\n" if apply else "",
        '    rows = rows.map(\n        tokens_of,\n        fn_kwargs={"tokenizer": tokenizer},\n'
        "        remove_columns=rows.column_names,\n    )\n",
        adapted,
        "    trainer = Trainer(\n        model=model,\n        args=arguments,\n"
        "        train_dataset=rows,\n        processing_class=tokenizer,\n"
        f"        data_collator=DataCollatorForSeq2Seq(tokenizer{padded}),\n    )\n",
    ]
    names = "DataCollatorForSeq2Seq, Trainer, TrainingArguments"
    return _script(
        config, recipe, "TrainingArguments", training_of(config, recipe),
        [("transformers", names)], function + TOKENS, "".join(body),
        constants=f"MAX_LENGTH = {config.seq_len}\n",
    )  # fmt: skip


def _script(
    config: RunConfig,
    recipe: Recipe,
    made: str,
    arguments: dict[str, Any],
    libraries: Sequence[tuple[str, str]],
    functions: str,
    body: str,
    *,
    constants: str = "",
) -> str:
    parts = [
        _environment(config, recipe),
        _imports(config, libraries, plain=made == "TrainingArguments"),
        f"\nMODEL = {literal(recipe.model)}\nDATA = {literal(recipe.data or NO_DATA)}\n{constants}",
        _maker("make_arguments", call(made, arguments)),
    ]
    if config.method != "full":
        adapter = lora_arguments(config, exclude=recipe.excluded)
        lines = call("LoraConfig", _given(adapter))
        if config.adapter == "fused":
            early = f"ends_early={config.recompute == 'needed'}"
            lines = f"lora = {lines}\n    lora._register_custom_module(fused_layers({early}))"
            parts.append(f"\n\ndef make_lora():\n    {lines}\n    return lora\n")
        else:
            parts.append(_maker("make_lora", lines))
    if config.method == "qlora":
        quantised = call("BitsAndBytesConfig", quantization_arguments(config))
        parts.append(_maker("make_quantization", quantised))
    parts += [
        functions,
        "\n\ndef main():\n",
        "    arguments = make_arguments()  # first: it takes this process's card\n",
        _load(config, recipe),
        body,
    ]
    parts += ["    trainer.train()\n    trainer.save_model()\n"]
    parts += ['\n\nif __name__ == "__main__":\n    main()\n']
    return "".join(parts)


def _maker(name: str, source: str) -> str:
    return f"\n\ndef {name}():\n    return {source}\n"


def _environment(config: RunConfig, recipe: Recipe) -> str:
    if config.allocator != "expandable_segments" or recipe.device != "cuda":
        return ""
    setting = 'os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"'
    return f"import os\n\n{setting}  # PyTorch reads it when it is imported\n\n"


def _imports(config: RunConfig, libraries: Sequence[tuple[str, str]], *, plain: bool) -> str:
    names: dict[str, set[str]] = {"datasets": {"load_dataset"}}
    names["transformers"] = {"AutoModelForCausalLM", "AutoTokenizer"}
    if config.method == "qlora":
        names["transformers"].add("BitsAndBytesConfig")
    if config.method != "full":
        names["peft"] = {"LoraConfig", *({"get_peft_model"} if plain else ())}
    if config.fp32_upcast:
        names.setdefault("peft", set()).add("prepare_model_for_kbit_training")
    if config.compile == "layers":
        names["transformers.modeling_layers"] = {"GradientCheckpointingLayer"}
    if config.adapter == "fused":
        names["lora_advisor.probes.fused_adapter"] = {"fused_layers"}
    if config.embedding == "host":
        names["lora_advisor.probes.host_embedding"] = {"keep_on_host"}
    if config.attention == "varlen":
        names["lora_advisor.probes.varlen_attention"] = {"use_bounds"}
        names["lora_advisor.probes.packed_rows"] = {"fill_up"}
    for module, words in libraries:
        names.setdefault(module, set()).update(words.split(", "))
    torch = "import torch\n" if config.precision == "fp16" and not plain else ""
    return torch + "".join(
        f"from {module} import {', '.join(sorted(names[module]))}\n" for module in sorted(names)
    )


def _load(config: RunConfig, recipe: Recipe) -> str:
    arguments = loading_arguments(config, device=recipe.device)
    if recipe.trust_remote_code:
        arguments["trust_remote_code"] = True
    lines = "".join(f"        {key}={literal(value)},\n" for key, value in arguments.items())
    if config.method == "qlora":
        lines += "        quantization_config=make_quantization(),\n"
    code = ", trust_remote_code=True" if recipe.trust_remote_code else ""
    text = f"    tokenizer = AutoTokenizer.from_pretrained(MODEL{code})"
    text += PADDING
    text += f"    model = AutoModelForCausalLM.from_pretrained(\n        MODEL,\n{lines}    )\n"
    text += "    model.config.use_cache = False\n"
    if config.fp32_upcast:
        checkpointed = config.checkpoint_every is not None
        text += UPCAST.lstrip("\n").format(checkpointed=checkpointed)
    if config.embedding == "host":
        text += "    keep_on_host(model)\n"
    if config.attention == "varlen":
        text += "    use_bounds(model)\n"
    if config.compile == "layers":
        text += COMPILE.lstrip("\n")
    return text


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if value is not None}


def _trl_rules(recipe: Recipe) -> list[Rule]:
    return [
        Rule(
            lambda c: c.trainer == "unsloth" and c.checkpointing == "unsloth",
            lambda c: {"trainer": "trl", "loss": "fused", "checkpointing": "offload"},
            "Unsloth's kernels and its checkpoints in host memory are not there: TRL's trainer "
            "with checkpoints held in host memory is written.",
        ),
        Rule(
            lambda c: c.trainer != "trl",
            lambda c: {"trainer": "trl", "loss": "fused"},
            "The step is TRL's, whose loss is computed in tiles, not the planned trainer's.",
        ),
    ]


def _attention_unpacked(config: RunConfig) -> dict[str, str]:
    return {"attention": "sdpa"} if config.attention == "varlen" else {}


def _plain_rules(recipe: Recipe) -> list[Rule]:
    return [
        Rule(
            lambda c: c.packing,
            lambda c: {"packing": False, **_attention_unpacked(c)},
            "Rows are not packed: transformers' Trainer packs none, so short rows are padded.",
        ),
        NO_GRAPH,
        ONE_PASS,
        *_trl_rules(recipe)[:1],
        *loss_rules(recipe, "transformers' Trainer"),
        Rule(
            lambda c: c.trainer != "transformers",
            lambda c: {"trainer": "transformers"},
            "The step is that of transformers' Trainer: autocast, and outputs that are let go.",
        ),
    ]


def loss_rules(recipe: Recipe, trainer: str) -> list[Rule]:
    """Return how TRL's fused loss is given up by a trainer that only has Liger's."""

    def is_tiled(config: RunConfig) -> bool:
        foreign = config.trainer != "transformers" and config.stage == "sft"
        return config.loss == "fused" and foreign

    fused = Rule(
        lambda c: is_tiled(c) and recipe.device == "cuda",
        lambda c: {"trainer": "transformers", "loss": "fused", "kernels": "liger"},
        f"TRL's fused loss is not there: Liger's kernels are written, with which {trainer} computes"
        " it in tiles too (needs the package liger-kernel).",
    )
    full = Rule(
        is_tiled,
        lambda c: {"trainer": "transformers", "loss": "full", "kernels": "none"},
        f"A fused loss is not there on a CPU: {trainer} computes the logits of all tokens at once.",
    )
    return [fused, full]


def _trl_notes(config: RunConfig, recipe: Recipe) -> list[str]:
    notes = []
    if config.stage == "dpo" and config.checkpointing != "full":
        notes.append(
            "TRL's DPOTrainer checkpoints every layer once its pass for the reference has run, "
            f"where {quoted(config.checkpointing)} was planned: `lora-advisor train` keeps it."
        )
    if config.adapter == "fused":
        notes.append("The fused adapter is lora-advisor's own code, so the script needs it.")
    if config.cuda_graph != "off":
        notes.append("The trainer of recorded micro-batches is lora-advisor's own code too.")
    elif config.loss == "one_pass":
        notes.append("The trainer of the one-pass loss is lora-advisor's own code too.")
    if config.embedding == "host":
        notes.append("What holds input embeddings in host memory is lora-advisor's own code too.")
    if config.attention == "varlen":
        notes.append("So is what keeps packed rows apart without a mask.")
    return notes


TRL = Target(
    name="trl",
    versions=TRL_VERSIONS,
    suffix=".py",
    run="python {file}",
    rules=_trl_rules,
    write=_write_trl,
    notes=_trl_notes,
)
TRANSFORMERS = Target(
    name="transformers",
    versions=PLAIN_VERSIONS,
    suffix=".py",
    run="python {file}",
    rules=_plain_rules,
    write=_write_plain,
    notes=_trl_notes,
    refuses=lambda config: (
        "transformers has no trainer for preference pairs (stage dpo); export --to trl"
        if config.stage == "dpo"
        else None
    ),
)
