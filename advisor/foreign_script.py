"""Read a script that this project has exported, its values perhaps changed since.

The script is parsed, never run: what stands in the calls of the libraries' classes is read where it
is a literal.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from lora_advisor.advisor.export_unsloth import CHECKPOINTING
from lora_advisor.advisor.foreign import Imported, Reading, leftover, model_of
from lora_advisor.advisor.foreign_irrelevant import is_irrelevant
from lora_advisor.probes.config import LoraShape, RunConfig
from lora_advisor.probes.errors import UsageError
from lora_advisor.probes.unsloth import ALL_LINEAR

#: Classes and functions whose arguments are read, and those of them that hold the training's.
_TRAINING = ("SFTConfig", "DPOConfig", "TrainingArguments")
_READ = (
    *_TRAINING, "LoraConfig", "BitsAndBytesConfig", "get_peft_model", "from_pretrained",
    "fused_layers",
)  # fmt: skip


class _Code:
    """A value that is not written out."""

    def __init__(self, source: str) -> None:
        self._source = source

    def __repr__(self) -> str:
        return f"the code `{self._source}`"


def read_script(text: str, where: str, source: str, marked: Mapping[str, Any]) -> Imported:
    """Return the configuration of an exported script.

    Raises:
        UsageError: It is no script of ours, or a value in it is none that can be read.
    """
    if marked.get("target") != source:
        raise UsageError(
            f"`{where}` must be a script that lora-advisor exported for {source}, but its own line "
            "is not in it; export again."
        )
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise UsageError(f"`{where}` must be a Python script, but {error}.") from None
    calls = _calls(tree, where)
    training = next((calls[name] for name in _TRAINING if name in calls), None)
    if training is None:
        raise UsageError(
            f"`{where}` must call one of {', '.join(_TRAINING)}, but calls none of them."
        )
    reading = _unsloth if source == "unsloth" else _plain
    config = reading(calls, training, tree, where, marked)
    ignored = leftover(training, tuple(training.values), is_irrelevant, "the trainer")
    return Imported(source=source, config=config, notes=tuple(training.notes), ignored=ignored)


def _plain(
    calls: Mapping[str, Reading],
    training: Reading,
    tree: ast.Module,
    where: str,
    marked: Mapping[str, Any],
) -> RunConfig:
    loaded = calls.get("from_pretrained", Reading(where, {}))
    trl = "TrainingArguments" not in calls
    kernels = "liger" if training.flag("use_liger_kernel") else "none"
    tiled = (training.take("liger_kernel_config") or {}).get("fused_linear_cross_entropy")
    method = "full" if "LoraConfig" not in calls else "lora"
    quantised: dict[str, Any] = {}
    if "BitsAndBytesConfig" in calls and calls["BitsAndBytesConfig"].flag("load_in_4bit"):
        method, four_bits = "qlora", calls["BitsAndBytesConfig"]
        quantised = {
            "quant_type": four_bits.words("bnb_4bit_quant_type", "fp4"),
            "double_quant": four_bits.flag("bnb_4bit_use_double_quant"),
        }
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return RunConfig(
        model=model_of(str(_constant(tree, "MODEL", where)), marked),
        stage="dpo" if "DPOConfig" in calls else "sft",
        trainer="trl" if trl else "transformers",
        method=method,
        seq_len=training.whole("max_length") if trl else _constant(tree, "MAX_LENGTH", where),
        precision=_precision(training, loaded.take("dtype")),
        checkpointing=_checkpointing(training),
        attention=_attention(loaded, names),
        kernels=kernels,
        loss=_loss(names, fused=trl or (kernels == "liger" and bool(tiled))),
        fp32_upcast="prepare_model_for_kbit_training" in names,
        lora=None if method == "full" else _lora(calls["LoraConfig"]),
        adapter="fused" if "fused_layers" in names else "peft",
        recompute="needed" if _ends_early(calls) else "layer",
        cuda_graph="micro_batch" if "GraphTrainer" in names else "off",
        embedding="host" if "keep_on_host" in names else "device",
        compile=_compile(training, names),
        allocator=_allocator(tree),
        packing=training.flag("packing"),
        **_common(training),
        **quantised,
    )


def _unsloth(
    calls: Mapping[str, Reading],
    training: Reading,
    tree: ast.Module,
    where: str,
    marked: Mapping[str, Any],
) -> RunConfig:
    loaded = calls.get("from_pretrained", Reading(where, {}))
    training.seen.add("gradient_checkpointing")
    method = "qlora" if loaded.flag("load_in_4bit", True) else "lora"
    if loaded.flag("full_finetuning"):
        method = "full"
    adapter = calls.get("get_peft_model", Reading(where, {}))
    asked = adapter.take("use_gradient_checkpointing", None)
    if asked is None:
        asked = loaded.take("use_gradient_checkpointing", "unsloth")
    words = {value: word for word, value in CHECKPOINTING.items()}
    if not isinstance(asked, bool | str) or asked not in words:
        raise loaded.wrong("use_gradient_checkpointing", 'True, False or "unsloth"', asked)
    return RunConfig(
        model=model_of(str(_constant(tree, "MODEL", where)), marked),
        method=method,
        seq_len=training.whole("max_length"),
        precision=_precision(training, loaded.take("dtype")),
        checkpointing=words[asked],
        attention="sdpa",
        kernels="none",
        loss="fused",
        lora=None if method == "full" else _lora(adapter, marked),
        compile="off",
        allocator=str(marked.get("allocator", "default")),
        packing=training.flag("packing"),
        **_common(training),
    )


def _common(training: Reading) -> dict[str, Any]:
    strategy = training.words("train_sampling_strategy", "random")
    training.seen |= {"pad_to_multiple_of"}
    return {
        "micro_batch": training.whole("per_device_train_batch_size", 8),
        "accumulation": training.whole("gradient_accumulation_steps", 1),
        "optimizer": training.words("optim", "adamw_torch_fused"),
        "group_by_length": strategy == "group_by_length",
    }


def _precision(training: Reading, dtype: Any) -> str:
    if training.flag("bf16"):
        training.seen.add("fp16")
        return "bf16"
    if training.flag("fp16"):
        return "fp16"
    return {"bfloat16": "bf16", "float16": "fp16"}.get(str(dtype), "fp32")


def _checkpointing(training: Reading) -> str:
    how = training.take("activation_checkpointing_kwargs") or {}
    if not training.flag("activation_checkpointing"):
        return "off"
    if how.get("offload"):
        return "offload"
    every = how.get("every_n_layers", 1)
    return "full" if every == 1 else f"every_{every}"


def _attention(loaded: Reading, names: set[str]) -> str:
    given = loaded.words("attn_implementation", "sdpa")
    return "varlen" if "use_bounds" in names else given


def _loss(names: set[str], *, fused: bool) -> str:
    if names & {"OnePassTrainer", "GraphTrainer"}:
        return "one_pass"
    return "fused" if fused else "full"


def _ends_early(calls: Mapping[str, Reading]) -> bool:
    return "fused_layers" in calls and calls["fused_layers"].flag("ends_early")


def _compile(training: Reading, names: set[str]) -> str:
    if training.flag("torch_compile"):
        return "model"
    return "layers" if "GradientCheckpointingLayer" in names else "off"


def _allocator(tree: ast.Module) -> str:
    """Return what is assigned to PyTorch's variable at the top of the script."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and "PYTORCH_ALLOC_CONF" in ast.unparse(node.targets[0]):
            expandable = "expandable_segments:True" in ast.unparse(node.value)
            return "expandable_segments" if expandable else "default"
    return "default"


def _lora(adapter: Reading, marked: Mapping[str, Any] | None = None) -> LoraShape:
    targets = adapter.take("target_modules", "all-linear")
    if isinstance(targets, list | tuple):
        targets = tuple(targets)
        # Unsloth's list is what "all-linear" means there, unless the plan named these modules.
        if marked is not None and targets == ALL_LINEAR and marked.get("targets") == "all-linear":
            targets = "all-linear"
    return LoraShape(
        r=adapter.whole("r"),
        alpha=adapter.number("lora_alpha", 8),
        dropout=adapter.number("lora_dropout", 0.0),
        targets=targets,
    )


def _calls(tree: ast.Module, where: str) -> dict[str, Reading]:
    found: dict[str, Reading] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name.endswith("from_pretrained") and "Model" not in name:
            continue
        name = name.rsplit(".", 1)[-1]
        if name not in _READ:
            continue
        values = {word.arg: _value(word.value) for word in node.keywords if word.arg is not None}
        if name != "get_peft_model" or values:  # peft's function of that name has none
            found[name] = Reading(where, values)
    return found


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch":
        return node.attr
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return _Code(ast.unparse(node))


def _constant(tree: ast.Module, name: str, where: str) -> Any:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return _value(node.value)
    raise UsageError(f"`{where}` must give {name} a value, but does not; export again.")
