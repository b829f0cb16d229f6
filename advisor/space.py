"""The legal configurations for a spec and a device."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lora_advisor.advisor.attention import why_not_varlen
from lora_advisor.advisor.axes import Axes, adapter_for, axes_of
from lora_advisor.advisor.left_out import LeftOut, leave_out, why_no_engine, why_not_recorded
from lora_advisor.advisor.trace_cache import TraceCache
from lora_advisor.probes import unsloth
from lora_advisor.probes.architectures import resolve_architecture
from lora_advisor.probes.cards import Card
from lora_advisor.probes.config import LOSSES, LoraShape, RunConfig
from lora_advisor.probes.errors import UsageError
from lora_advisor.probes.machine import Machine, Stack
from lora_advisor.probes.spec import Spec


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
    axes = axes_of(spec, machine, card, cache)
    excluded = leave_out(axes, machine, stack)
    engine = _engine(spec, machine, axes, excluded)
    _graphs(spec, machine, axes, excluded)
    axes.update(_fixed(spec))
    if spec.fixed.get("attention") == "varlen":
        _check_varlen(spec, machine, axes, cache)
    excluded = [item for item in excluded if item[0].split(" ")[0] not in spec.fixed]
    if "adapter" not in spec.fixed and spec.fixed.get("trainer") != unsloth.NAME:
        axes["adapter"] = (adapter_for(axes, spec),)
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


def _engine(spec: Spec, machine: Machine, axes: Axes, excluded: list[LeftOut]) -> str | None:
    """Return the other engine that is tried; where it alone is asked for, its axes are set."""
    why_not = why_no_engine(spec, machine)
    if spec.fixed.get("trainer") != unsloth.NAME:
        if why_not is None:
            return unsloth.NAME
        excluded.append((f"trainer {unsloth.NAME}", why_not))
        return None
    if why_not is not None:
        raise UsageError(f"`--trainer {unsloth.NAME}` cannot be planned for: {why_not}.")
    axes.update({knob: (value,) for knob, value in unsloth.AS_IT_IS.items()})
    # Its probes take a minute and more, so what moves little is not looked at.
    axes.update({knob: axes[knob][:1] for knob in ("precision", "optimizer")})
    return None


def _graphs(spec: Spec, machine: Machine, axes: Axes, excluded: list[LeftOut]) -> None:
    """Leave out micro-batches as CUDA graphs where they cannot be recorded."""
    why_not = why_not_recorded(spec, machine)
    if why_not is None:
        return
    if spec.fixed.get("cuda_graph", "off") != "off":
        raise UsageError(
            f"`--cuda-graph micro_batch` cannot be planned for: {why_not}; leave it out."
        )
    excluded.append(("cuda_graph micro_batch", why_not))
    axes["cuda_graph"] = ("off",)


def _check_varlen(spec: Spec, machine: Machine, axes: Axes, cache: TraceCache | None) -> None:
    """Refuse attention by bounds where this model or this card cannot have it."""
    architecture = resolve_architecture(spec.model, trust_remote_code=spec.trust_remote_code)
    cache = None if spec.trust_remote_code else cache
    why_not = why_not_varlen(architecture, cache, machine, axes["precision"][0])
    if why_not is not None:
        raise UsageError(f"`--attention varlen` cannot be planned for: {why_not}; leave it out.")


def _fixed(spec: Spec) -> Axes:
    """Return the axes that the user has fixed, of one value each."""
    size = spec.fixed.get("micro_batch")
    if size is not None and size < 1:
        raise UsageError(f"`--micro-batch` must be at least 1 sequence, but got {size}.")
    if size is not None and spec.effective_batch % size:
        raise UsageError(
            f"`--micro-batch` must divide the effective batch, but {size} does not divide "
            f"{spec.effective_batch}; give --batch {size * -(-spec.effective_batch // size)}."
        )
    return {knob: (value,) for knob, value in spec.fixed.items()}


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
            if "packing" in given_up and "attention" not in spec.fixed:
                options["attention"] = ("sdpa",)  # what packed rows have is for them alone
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
