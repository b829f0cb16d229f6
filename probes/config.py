"""`RunConfig`: one training configuration, and the words it may use.

The same JSON stands in plans, probe records, `predict` and exports. A configuration that exists is
legal: every check is made when it is built, and the message names the field, what came and why not.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Self

from lora_advisor.probes.checks import (
    check_flag,
    check_number,
    check_whole,
    check_word,
    fields_of,
)
from lora_advisor.probes.errors import UsageError
from lora_advisor.probes.legality import check_combinations

STAGES = ("sft", "dpo")
TRAINERS = ("trl", "transformers", "loop")
#: Engines whose steps are not built here: they run with packages of their own, and are not traced.
FOREIGN_TRAINERS = ("unsloth",)
METHODS = ("lora", "qlora", "full")
QUANT_TYPES = ("nf4", "fp4")
PRECISIONS = ("bf16", "fp16", "fp32")
ATTENTIONS = ("sdpa", "eager", "flash_attention_2", "varlen")
KERNELS = ("none", "liger")
LOSSES = ("full", "fused", "one_pass")
ADAPTERS = ("peft", "fused")
COMPILES = ("off", "layers", "model")
ALLOCATORS = ("default", "expandable_segments")
EMBEDDINGS = ("device", "host")
RECOMPUTES = ("layer", "needed")
CUDA_GRAPHS = ("off", "micro_batch")

#: transformers.training_args.OptimizerNames (5.23), copied so that reading a configuration needs
#: no import of transformers; a test compares the two.
OPTIMIZERS = (
    "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor",
    "adamw_anyprecision", "adamw_torch_4bit", "adamw_torch_8bit", "ademamix", "sgd", "adagrad",
    "adamw_bnb_8bit", "adamw_8bit", "ademamix_8bit", "lion_8bit", "lion_32bit",
    "paged_adamw_32bit", "paged_adamw_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit",
    "paged_lion_32bit", "paged_lion_8bit", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit", "galore_adamw", "galore_adamw_8bit", "galore_adafactor",
    "galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise", "lomo",
    "adalomo", "grokadamw", "schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd",
    "apollo_adamw", "apollo_adamw_layerwise", "stable_adamw",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraShape:
    """The adapter: rank, scale, dropout and the modules that carry it.

    Attributes:
        r: Rank of the two factors, at least 1.
        alpha: Scale; the update is multiplied by alpha / r.
        dropout: Share of the adapter's input set to zero, in [0, 1).
        targets: "all-linear" (every linear layer but the head) or names of modules.
    """

    r: int
    alpha: float
    dropout: float
    targets: str | tuple[str, ...]

    def __post_init__(self) -> None:
        """Refuse what peft would refuse, or accept and misread."""
        check_whole("lora.r", self.r, least=1)
        check_number("lora.alpha", self.alpha, above=0)
        check_number("lora.dropout", self.dropout, above=None)
        if not 0 <= self.dropout < 1:
            raise UsageError(f"`lora.dropout` must lie in [0, 1), but got {self.dropout!r}.")
        if isinstance(self.targets, str):
            if self.targets != "all-linear":
                raise UsageError(
                    '`lora.targets` must be "all-linear" or a list of module names, but got '
                    f"{self.targets!r}; write [{self.targets!r}] for a single module."
                )
        elif not self.targets or not all(isinstance(name, str) and name for name in self.targets):
            raise UsageError(
                f"`lora.targets` must name at least one module, but got {list(self.targets)!r}."
            )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; `targets` is a string or a list."""
        targets = self.targets if isinstance(self.targets, str) else list(self.targets)
        return {"r": self.r, "alpha": self.alpha, "dropout": self.dropout, "targets": targets}

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Read the JSON form; all four fields must be there."""
        values = fields_of(cls, data, where="lora.")
        targets = values["targets"]
        if isinstance(targets, list):
            values["targets"] = tuple(targets)
        elif not isinstance(targets, str):
            raise UsageError(
                f'`lora.targets` must be "all-linear" or a list of names, but got {targets!r}.'
            )
        return cls(**values)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One training configuration.

    Attributes:
        model: Bundled name, folder, path of a config.json, or hub id.
        stage: "sft", or "dpo": preference pairs and TRL's DPOTrainer. A micro-batch then counts
            pairs, each of which is two sequences.
        trainer: "trl" (SFTTrainer), "transformers" (Trainer), "loop" (a bare PyTorch loop without
            autocast that keeps its outputs until the next step) or "unsloth" (`probes/unsloth.py`).
        method: "lora", "qlora" or "full".
        quant_type: Type of the 4-bit base weights: "nf4" or "fp4"; null without quantisation.
        double_quant: Whether the quantisation constants are quantised too; null without.
        micro_batch: Sequences (of stage "dpo": pairs) in one forward pass.
        accumulation: Micro-batches in one optimizer step.
        seq_len: Tokens in one sequence, padding included.
        optimizer: A name of transformers' OptimizerNames.
        precision: "bf16", "fp16" or "fp32".
        checkpointing: "off", "full" (every layer), "every_N" (every N-th layer), "offload"
            (every layer, what is stored is held in host memory), or "unsloth" (its own form of
            that).
        recompute: Of an eager checkpointed layer, "layer": all of it, or "needed": what the
            backward pass needs, all but the last product (`probes/fused_adapter.py`). Compiled
            layers leave that product out by themselves.
        attention: "sdpa", "eager", "flash_attention_2", or of packed rows "varlen": by where each
            document begins, without a mask (`probes/varlen_attention.py`).
        kernels: "none" or "liger".
        loss: "full" (logits of all tokens at once), "fused" (in tiles, never all at once), or
            "one_pass" (so too, each tile once: `probes/one_pass_head.py`).
        fp32_upcast: Whether peft's prepare_model_for_kbit_training is applied.
        lora: The adapter; null for method "full".
        adapter: Whose code multiplies with it: "peft", or "fused" (`probes/fused_adapter.py`).
        compile: "off", "layers" (each decoder layer) or "model".
        cuda_graph: "off", or "micro_batch": forward and backward of a micro-batch are recorded once
            and replayed (`probes/graph_trainer.py`).
        allocator: "default" or "expandable_segments".
        embedding: Where the input embeddings are held: "device", or "host"
            (`probes/host_embedding.py`).
        packing: Whether short rows share a sequence.
        group_by_length: Whether rows of like length share a micro-batch.
    """

    model: str
    stage: str = "sft"
    trainer: str = "trl"
    method: str
    quant_type: str | None = None
    double_quant: bool | None = None
    micro_batch: int
    accumulation: int = 1
    seq_len: int
    optimizer: str
    precision: str
    checkpointing: str
    recompute: str = "layer"
    attention: str
    kernels: str
    loss: str
    fp32_upcast: bool = False
    lora: LoraShape | None = None
    adapter: str = "peft"
    compile: str
    cuda_graph: str = "off"
    allocator: str
    embedding: str = "device"
    packing: bool = False
    group_by_length: bool = False

    def __post_init__(self) -> None:
        """Fill the defaults that depend on the method, then refuse every illegal combination."""
        if not isinstance(self.model, str) or not self.model:
            raise UsageError(f"`model` must be a name or a path, but got {self.model!r}.")
        check_word("stage", self.stage, STAGES)
        check_word("trainer", self.trainer, TRAINERS + FOREIGN_TRAINERS)
        check_word("method", self.method, METHODS)
        if self.method == "qlora":
            if self.quant_type is None:
                object.__setattr__(self, "quant_type", "nf4")
            if self.double_quant is None:
                object.__setattr__(self, "double_quant", True)
            check_word("quant_type", self.quant_type, QUANT_TYPES)
            check_flag("double_quant", self.double_quant)
        else:
            for name, value in (
                ("quant_type", self.quant_type),
                ("double_quant", self.double_quant),
            ):
                if value is not None and value is not False:
                    raise UsageError(
                        f"`{name}` must be null with method {self.method!r}, which does not "
                        f'quantise the base model, but got {value!r}; use method "qlora".'
                    )
            object.__setattr__(self, "double_quant", None)
        for name in ("micro_batch", "accumulation"):
            check_whole(name, getattr(self, name), least=1)
        check_whole("seq_len", self.seq_len, least=2)
        check_word("optimizer", self.optimizer, OPTIMIZERS)
        check_word("precision", self.precision, PRECISIONS)
        check_word("attention", self.attention, ATTENTIONS)
        check_word("kernels", self.kernels, KERNELS)
        check_word("loss", self.loss, LOSSES)
        check_word("adapter", self.adapter, ADAPTERS)
        check_word("compile", self.compile, COMPILES)
        check_word("allocator", self.allocator, ALLOCATORS)
        check_word("embedding", self.embedding, EMBEDDINGS)
        check_word("recompute", self.recompute, RECOMPUTES)
        check_word("cuda_graph", self.cuda_graph, CUDA_GRAPHS)
        for name in ("fp32_upcast", "packing", "group_by_length"):
            check_flag(name, getattr(self, name))
        self._check_checkpointing()
        if self.method != "full" and not isinstance(self.lora, LoraShape):
            raise UsageError(f"`lora` must be given with method {self.method!r}.")
        check_combinations(self)
        if self.compile != "off" or self.checkpointing == "off":
            object.__setattr__(self, "recompute", "layer")  # the same under another name

    def _check_checkpointing(self) -> None:
        if self.checkpointing in ("off", "full", "offload"):
            return
        if self.trainer in FOREIGN_TRAINERS and self.checkpointing == self.trainer:
            return
        match = re.fullmatch(r"every_([1-9][0-9]*)", str(self.checkpointing))
        if match is None or int(match[1]) < 2:
            raise UsageError(
                '`checkpointing` must be "off", "full", "offload" or "every_N" with N of at least '
                f"2, but got {self.checkpointing!r}."
            )

    @property
    def sequences(self) -> int:
        """Sequences in one micro-batch; a pair is two."""
        return self.micro_batch * (2 if self.stage == "dpo" else 1)

    @property
    def tokens(self) -> int:
        """Tokens in one micro-batch, padding included."""
        return self.sequences * self.seq_len

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one optimizer step, padding included."""
        return self.tokens * self.accumulation

    @property
    def checkpoint_every(self) -> int | None:
        """Every how many layers one is checkpointed; None when none is."""
        if self.checkpointing == "off":
            return None
        match = re.fullmatch(r"every_(\d+)", self.checkpointing)
        return int(match[1]) if match else 1

    @property
    def is_buildable(self) -> bool:
        """Whether this project builds the step itself, so that it can be traced."""
        return self.trainer not in FOREIGN_TRAINERS

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed, checked like any other."""
        if changes.get("method", self.method) != "qlora":
            changes.setdefault("quant_type", None)
            changes.setdefault("double_quant", None)
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, every field written out.

        What older programs do not know only stands there where it is not as they take it to be.
        """
        data: dict[str, Any] = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)
        }
        for name, usual in (
            ("group_by_length", False),
            ("adapter", "peft"),
            ("stage", "sft"),
            ("embedding", "device"),
            ("recompute", "layer"),
            ("cuda_graph", "off"),
        ):
            if data[name] == usual:
                del data[name]
        data["lora"] = None if self.lora is None else self.lora.to_json()
        return data

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Read the JSON form.

        Raises:
            UsageError: A field is unknown, missing, of the wrong type, or does not go with another.
        """
        values = fields_of(cls, data, where="")
        lora = values.get("lora")
        values["lora"] = None if lora is None else LoraShape.from_json(lora)
        return cls(**values)
