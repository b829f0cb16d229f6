"""What of a search's axes is left out, and the sentence that says why."""

from __future__ import annotations

import sys

from lora_advisor.advisor.axes import Axes
from lora_advisor.probes import unsloth
from lora_advisor.probes.architectures import resolve_architecture
from lora_advisor.probes.machine import Machine, Stack
from lora_advisor.probes.randomness import may_draw
from lora_advisor.probes.spec import Spec

#: A knob and its value, or what else is not there; and why.
LeftOut = tuple[str, str]


def why_not_recorded(spec: Spec, machine: Machine) -> str | None:
    """Return why micro-batches are not recorded as CUDA graphs; None where they are."""
    if machine.kind == "cpu":
        return "it is the GPU that replays it"
    if spec.dropout > 0:
        return "the adapter's dropout draws numbers"
    architecture = resolve_architecture(spec.model, trust_remote_code=spec.trust_remote_code)
    return "the model draws random numbers" if may_draw(architecture.hf_config) else None


def why_no_engine(spec: Spec, machine: Machine) -> str | None:
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


def leave_out(axes: Axes, machine: Machine, stack: Stack) -> list[LeftOut]:
    """Take from the axes what this machine or its packages do not have; return what, and why."""
    excluded: list[LeftOut] = []

    def without(knob: str, value: str, why: str) -> None:
        axes[knob] = tuple(v for v in axes[knob] if v != value)
        excluded.append((f"{knob} {value}", why))

    if machine.kind == "cpu":
        without("kernels", "liger", "its Triton kernels need a GPU")
        without("compile", "layers", "on a CPU compiling costs more than it brings")
        for paged in ("paged_adamw_8bit", "paged_adamw_32bit"):
            without("optimizer", paged, "paging moves states off a GPU; there is none")
        without("allocator", "expandable_segments", "it is a setting of the GPU's allocator")
    elif stack.liger_kernel is None:
        without("kernels", "liger", "liger-kernel is not installed (lora-advisor[gpu])")
    if machine.kind == "cuda" and sys.platform == "win32":
        without("allocator", "expandable_segments", "PyTorch's allocator has none on Windows")
    if machine.kind == "card":
        without("compile", "layers", "what compiling gains can only be measured, on the card")
        if "bf16" in axes["precision"]:
            without("precision", "fp16", "as fast as bf16 by the figures; measure it there")
    if stack.trl is None:
        axes["trainer"] = ("transformers",)
        excluded.append(("trainer trl", "trl is not installed"))
    return excluded
