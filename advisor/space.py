"""The legal configurations for a spec and a device, and why each part left out is left out."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lora_advisor.advisor.attention import attention, packed_attention
from lora_advisor.advisor.trace_cache import TraceCache
from lora_advisor.probes import unsloth
from lora_advisor.probes.architectures import embedding_bytes, has_own_head, resolve_architecture
from lora_advisor.probes.cards import Card
from lora_advisor.probes.config import LOSSES, LoraShape, RunConfig
from lora_advisor.probes.errors import UsageError
from lora_advisor.probes.machine import Machine, Stack
from lora_advisor.probes.randomness import may_draw
from lora_advisor.probes.spec import Spec

#: From which share of the memory on the input embeddings are worth holding elsewhere.
_NOTICEABLE = 0.05


@dataclass(frozen=True)
class Space:
    """The axes of the search.

    Attributes:
        axes: Values of each knob that is searched or fixed.
        base: What all configurations share.
        effective_batch: Sequences in one optimizer step, the same for all.
        excluded: What was left out, and why.
        engine: Another engine whose configurations are as legal; None where there is none.
        records: Whether micro-batches are recorded as CUDA graphs where a choice asks for it and it
            goes; False too where the user has decided.
    """

    axes: Mapping[str, tuple[Any, ...]]
    base: Mapping[str, Any]
    effective_batch: int
    excluded: tuple[tuple[str, str], ...]
    engine: str | None = None
    records: bool = False

    def config(self, choice: Mapping[str, Any]) -> RunConfig:
        """Return the configuration of one choice a knob.

        Raises:
            UsageError: The combination is illegal.
        """
        values = {**self.base, **choice}
        values["accumulation"] = self.effective_batch // values["micro_batch"]
        values.setdefault("loss", _loss(values))
        if values["method"] == "full":
            values["lora"] = None
        values.setdefault("recompute", "needed" if values["adapter"] == "fused" else "layer")
        if self.records and values["cuda_graph"] != "off" and not _can_be_recorded(values):
            values["cuda_graph"] = "off"
        return RunConfig(**values)

    def configs(self) -> Iterator[RunConfig]:
        """Return every legal configuration that is worth a look."""
        for values in itertools.product(*self.axes.values()):
            choice = dict(zip(self.axes, values, strict=True))
            if self.is_pointless(choice):
                continue
            try:
                yield self.config(choice)
            except UsageError:
                continue

    def is_pointless(self, choice: Mapping[str, Any]) -> bool:
        """Whether a choice is another one under a second name.

        Liger's kernels break a layer's graph (liger_kernel/backends/dispatch.py is kept from the
        compiler), so a layer that has them runs as it is. Where both are asked for, so be it.
        """
        both = choice["compile"] == "layers" and choice["kernels"] == "liger"
        return both and len(self.axes["compile"]) * len(self.axes["kernels"]) > 1


def _loss(values: Mapping[str, Any]) -> str:
    """Return how the loss is computed: in one pass wherever that goes.

    It multiplies with the head twice where TRL's does three times, and does not
    wait for the device in padded rows (benchmarks/results/one_pass_h100_2026-11-27.json).
    """
    if values["trainer"] == "trl":
        return "fused" if values["stage"] == "dpo" or values["method"] == "full" else "one_pass"
    if values["trainer"] == unsloth.NAME:
        return "fused"
    return "fused" if values["kernels"] == "liger" else "full"


def _can_be_recorded(values: Mapping[str, Any]) -> bool:
    """Whether micro-batches can be CUDA graphs."""
    try:
        RunConfig(**{**values, "cuda_graph": "micro_batch"})
    except UsageError:
        return False
    return True


def build_space(
    spec: Spec,
    machine: Machine,
    stack: Stack,
    card: Card | None,
    *,
    cache: TraceCache | None = None,
) -> Space:
    """Return the space of a spec.

    Args:
        spec: What the user wants.
        machine: The device.
        stack: The installed versions.
        card: The device's row in the card table.
        cache: Keeps traces, and which attention a model has; None to ask transformers.

    Raises:
        UsageError: The fixed knobs leave no legal configuration.
    """
    excluded: list[tuple[str, str]] = []
    axes: dict[str, tuple[Any, ...]] = {
        "stage": ("sft",),
        "trainer": ("trl",),
        "method": ("lora", "qlora"),
        "micro_batch": tuple(
            n for n in range(1, spec.effective_batch + 1) if spec.effective_batch % n == 0
        ),
        "optimizer": ("adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"),
        "precision": _precisions(machine, card),
        "checkpointing": ("full", "every_2", "off", "every_4"),
        "attention": (_attention(spec, cache, machine),),
        "kernels": ("none", "liger"),
        "adapter": ("fused",),
        "compile": ("off", "layers"),
        # In every pair of runs on an H100 the recorded one was as fast or faster
        # (benchmarks/results/cuda_graphs_h100_2026-11-27.json); without, a card has more memory.
        "cuda_graph": ("micro_batch", "off"),
        "allocator": _allocators(spec),
        "embedding": _embeddings(spec, machine),
        "packing": (False,),
        "fp32_upcast": (False,),
    }
    if spec.objective == "seq_len":
        axes["seq_len"] = _lengths(spec)
        axes["micro_batch"] = (1,)
    _exclude(axes, excluded, machine, stack)
    engine = None
    no_engine = _why_no_engine(spec, machine)
    if spec.fixed.get("trainer") == unsloth.NAME:
        if no_engine is not None:
            raise UsageError(f"`--trainer {unsloth.NAME}` cannot be planned for: {no_engine}.")
        axes.update({knob: (value,) for knob, value in unsloth.AS_IT_IS.items()})
        # Its probes take a minute and more, so what moves little is not looked at.
        axes.update({knob: axes[knob][:1] for knob in ("precision", "optimizer")})
    elif no_engine is not None:
        excluded.append((f"trainer {unsloth.NAME}", no_engine))
    else:
        engine = unsloth.NAME
    not_recorded = _why_not_recorded(spec, machine)
    if not_recorded is not None:
        if spec.fixed.get("cuda_graph", "off") != "off":
            raise UsageError(
                f"`--cuda-graph micro_batch` cannot be planned for: {not_recorded}; leave it out."
            )
        excluded.append(("cuda_graph micro_batch", not_recorded))
        axes["cuda_graph"] = ("off",)
    for knob, value in spec.fixed.items():
        if knob == "micro_batch" and value < 1:
            raise UsageError(f"`--micro-batch` must be at least 1 sequence, but got {value}.")
        if knob == "micro_batch" and spec.effective_batch % value:
            raise UsageError(
                f"`--micro-batch` must divide the effective batch, but {value} does not divide "
                f"{spec.effective_batch}; give --batch {value * -(-spec.effective_batch // value)}."
            )
        axes[knob] = (value,)
        excluded = [item for item in excluded if not item[0].startswith(f"{knob} ")]
    if "adapter" not in spec.fixed and spec.fixed.get("trainer") != unsloth.NAME:
        axes["adapter"] = (_adapter(axes, spec),)
    base = {
        "model": spec.model,
        "seq_len": spec.seq_len,
        "lora": LoraShape(
            r=spec.rank, alpha=spec.alpha, dropout=spec.dropout, targets=spec.targets
        ),
    }
    records = "cuda_graph" not in spec.fixed
    space = Space(axes, base, spec.effective_batch, tuple(excluded), engine, records)
    if next(space.configs(), None) is None:
        raise UsageError(_contradiction(space, spec))
    return space


def _why_not_recorded(spec: Spec, machine: Machine) -> str | None:
    """Return why micro-batches are not recorded as CUDA graphs; None where they are."""
    if machine.kind == "cpu":
        return "it is the GPU that replays it"
    if spec.dropout > 0:
        return "the adapter's dropout draws numbers"
    architecture = resolve_architecture(spec.model, trust_remote_code=spec.trust_remote_code)
    return "the model draws random numbers" if may_draw(architecture.hf_config) else None


def _why_no_engine(spec: Spec, machine: Machine) -> str | None:
    """Return why Unsloth is not tried; None where it is."""
    architecture = resolve_architecture(spec.model, trust_remote_code=spec.trust_remote_code)
    why = unsloth.why_not(
        architecture.hf_config.get("model_type"),
        device=machine.kind,
        stage=spec.fixed.get("stage", "sft"),
        gpus=spec.gpus,
    )
    if why is not None:
        return why
    if spec.fixed.get("method") == "full":
        return "with it adapters are trained here"
    for knob, value in spec.fixed.items():
        free = knob == "trainer" and value == unsloth.NAME
        legal = unsloth.CHECKPOINTING if knob == "checkpointing" else ()
        if knob == "allocator" or free or value in legal:
            continue
        if unsloth.AS_IT_IS.get(knob, value) != value:
            return f"`--{knob.replace('_', '-')} {value}` is not its way"
    return None


def _adapter(axes: Mapping[str, tuple[Any, ...]], spec: Spec) -> str:
    """Return whose code multiplies with the adapter.

    The fused one wherever it goes: it computes what peft's does in fewer passes, and was faster in
    every pair of runs (benchmarks/results/fused_on_h100.json).
    """
    goes = spec.dropout == 0 and axes["method"] != ("full",) and "loop" not in axes["trainer"]
    return "fused" if goes else "peft"


def _contradiction(space: Space, spec: Spec) -> str:
    """Say why the fixed knobs leave nothing, and the smallest change that would leave something.

    That is the fewest fixed knobs to give up, and of those the value nearest to what was asked.
    """
    first = {knob: values[0] for knob, values in space.axes.items()}
    try:
        space.config(first)
        why = ""
    except UsageError as error:
        why = f": {error}"
    fixed = [knob for knob in spec.fixed if knob in space.axes]
    for count in range(1, len(fixed) + 1):
        for given_up in itertools.combinations(fixed, count):
            options = {knob: _VALUES[knob] for knob in given_up if knob in _VALUES}
            if len(options) < count:
                continue
            changed = dataclasses.replace(space, axes={**space.axes, **options})
            legal = next(changed.configs(), None)
            if legal is not None:
                change = " and ".join(_setting(knob, getattr(legal, knob)) for knob in given_up)
                return f"the fixed knobs leave no legal configuration{why} {change} would do."
    return f"the fixed knobs leave no legal configuration{why}"


def _setting(knob: str, value: Any) -> str:
    option = f"--{knob.replace('_', '-')}"
    return f"`{option} {value}`" if isinstance(value, str) else f"Without `{option}` it"


#: What a knob may be set to instead, the usual first.
_VALUES: dict[str, tuple[Any, ...]] = {
    "stage": ("sft", "dpo"),
    "trainer": ("trl", "transformers"),
    "method": ("lora", "qlora"),
    "precision": ("bf16", "fp16", "fp32"),
    "checkpointing": ("full", "off"),
    "attention": ("sdpa", "eager", "varlen"),
    "kernels": ("none", "liger"),
    "adapter": ("peft", "fused"),
    "compile": ("off", "layers"),
    "loss": LOSSES,
    "packing": (False,),
    "fp32_upcast": (False,),
    "group_by_length": (False,),
    "quant_type": (None, "nf4"),
    "double_quant": (None, True),
    "optimizer": ("adamw_torch_fused",),
    "allocator": ("default",),
    "embedding": ("device",),
    "cuda_graph": ("off", "micro_batch"),
    "recompute": ("layer", "needed"),
}


def _allocators(spec: Spec) -> tuple[str, ...]:
    """Return the allocator's settings, the one first that is taken where both are as fast.

    Rows of a user's data differ in how many of their tokens have a loss, so tensors of the loss
    differ in size from batch to batch, and segments that do not expand pile up: a training that
    was to hold 5.2 GiB held 6.4 after an epoch, one whose segments expand what was promised ("sft"
    and "dpo" in benchmarks/results/train_gsm8k_h100_2026-11-27.json).
    """
    plain, expandable = "default", "expandable_segments"
    return (plain, expandable) if spec.data is None else (expandable, plain)


def _embeddings(spec: Spec, machine: Machine) -> tuple[str, ...]:
    """Return where the input embeddings may be, the place first that is taken where it can matter.

    The host can hold those that are not trained and no head's weight as well. Where they would take
    a noticeable part of the card it does, and the card is tried around the best.
    """
    architecture = resolve_architecture(spec.model, trust_remote_code=spec.trust_remote_code)
    free = has_own_head(architecture) and spec.fixed.get("method") != "full"
    if machine.kind == "cpu" or not free:
        return ("device",)
    limit = spec.vram_bytes - spec.reserve_bytes
    if embedding_bytes(architecture) < _NOTICEABLE * limit:
        return ("device",)
    return ("host", "device")


def _lengths(spec: Spec) -> tuple[int, ...]:
    """Return the sequence lengths that are looked at where the longest is sought.

    From the asked one up in steps of a third to a half, as far as the model's positions go.
    """
    architecture = resolve_architecture(spec.model, trust_remote_code=spec.trust_remote_code)
    most = int(architecture.hf_config.get("max_position_embeddings") or 32 * spec.seq_len)
    lengths, step = [], spec.seq_len
    while step <= most:
        lengths += [step, *([step * 3 // 2] if step * 3 // 2 <= most else [])]
        step *= 2
    return tuple(lengths or [spec.seq_len])


def _attention(spec: Spec, cache: TraceCache | None, machine: Machine | None) -> str:
    """Return the attention of a model, on a machine where rows may be packed."""
    architecture = resolve_architecture(spec.model, trust_remote_code=spec.trust_remote_code)
    # Code of the model's own may have changed.
    cache = None if spec.trust_remote_code else cache
    if machine is None or not spec.fixed.get("packing"):
        return attention(architecture, cache)
    precision = spec.fixed.get("precision", "bf16")
    return packed_attention(architecture, cache, machine, precision)


def _precisions(machine: Machine, card: Card | None) -> tuple[str, ...]:
    """bf16, then fp16, where the device multiplies in both; fp32 on a CPU, faster there."""
    if machine.kind == "cpu":
        return ("fp32",)
    knows = card.bf16_tflops if card is not None else float(machine.capability or 8) >= 8
    return ("bf16", "fp16") if knows else ("fp16",)


def _exclude(
    axes: dict[str, tuple[Any, ...]],
    excluded: list[tuple[str, str]],
    machine: Machine,
    stack: Stack,
) -> None:
    def leave_out(knob: str, value: str, why: str) -> None:
        axes[knob] = tuple(v for v in axes[knob] if v != value)
        excluded.append((f"{knob} {value}", why))

    if machine.kind == "cpu":
        leave_out("kernels", "liger", "its Triton kernels need a GPU")
        leave_out("compile", "layers", "on a CPU compiling costs more than it brings")
        for paged in ("paged_adamw_8bit", "paged_adamw_32bit"):
            leave_out("optimizer", paged, "paging moves states off a GPU; there is none")
        leave_out("allocator", "expandable_segments", "it is a setting of the GPU's allocator")
    elif stack.liger_kernel is None:
        leave_out("kernels", "liger", "liger-kernel is not installed (lora-advisor[gpu])")
    if machine.kind == "card":
        leave_out("compile", "layers", "what compiling gains can only be measured, on the card")
        if "bf16" in axes["precision"]:
            leave_out("precision", "fp16", "as fast as bf16 by the figures; measure it there")
    if stack.trl is None:
        axes["trainer"] = ("transformers",)
        excluded.append(("trainer trl", "trl is not installed"))


def baseline_config(spec: Spec, precision: str, *, cache: TraceCache | None = None) -> RunConfig:
    """Return what most tutorials run: Trainer, QLoRA after prepare_model_for_kbit_training, 2 rows.

    Preference pairs have TRL's trainer there. It keeps the user's stage, sequence length, effective
    batch and adapter.
    """
    micro_batch = 2 if spec.effective_batch % 2 == 0 else 1
    stage = spec.fixed.get("stage", "sft")
    return RunConfig(
        model=spec.model,
        stage=stage,
        trainer="trl" if stage == "dpo" else "transformers",
        method="qlora",
        micro_batch=micro_batch,
        accumulation=spec.effective_batch // micro_batch,
        seq_len=spec.seq_len,
        optimizer="adamw_torch_fused",
        precision=precision,
        checkpointing="full",
        attention=_attention(spec, cache, None),
        kernels="none",
        loss="fused" if stage == "dpo" else "full",
        fp32_upcast=True,
        lora=LoraShape(r=spec.rank, alpha=spec.alpha, dropout=spec.dropout, targets=spec.targets),
        compile="off",
        allocator="default",
    )
