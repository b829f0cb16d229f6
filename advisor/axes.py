"""The values of each knob that a search may look at, the usual first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_advisor.advisor.attention import attention, packed_attention
from lora_advisor.advisor.trace_cache import TraceCache
from lora_advisor.probes.architectures import embedding_bytes, has_own_head, resolve_architecture
from lora_advisor.probes.cards import Card
from lora_advisor.probes.machine import Machine
from lora_advisor.probes.spec import Spec

Axes = dict[str, tuple[Any, ...]]

#: From which share of the memory on the input embeddings are worth holding elsewhere.
_NOTICEABLE = 0.05
#: The allocator's settings, the one first that is taken where both are as fast: segments that
#: expand. What is free in others, beside something that is held, is lost to a CUDA graph, which has
#: segments of its own: after the weights of a 4-bit 7B were loaded, over 1 GiB of 7
#: (tests/recordings/h100-graphs-7b-2026-11-28.jsonl). And rows of a user's data differ in how many
#: of their tokens have a loss, so tensors of the loss differ in size from batch to batch and
#: segments that do not expand pile up: a training that was to hold 5.2 GiB held 6.4 after an epoch,
#: one whose segments expand what was promised ("sft" and "dpo" in
#: benchmarks/results/train_gsm8k_h100_2026-11-27.json).
_ALLOCATORS = ("expandable_segments", "default")


def axes_of(spec: Spec, machine: Machine, card: Card | None, cache: TraceCache | None) -> Axes:
    """Return the axes of a spec, before anything is left out or fixed.

    Args:
        spec: What the user wants.
        machine: The device.
        card: The device's row in the card table.
        cache: Keeps which attention a model has; None to ask transformers.
    """
    axes: Axes = {
        "stage": ("sft",),
        "trainer": ("trl",),
        "method": ("lora", "qlora"),
        "micro_batch": tuple(
            n for n in range(1, spec.effective_batch + 1) if spec.effective_batch % n == 0
        ),
        "optimizer": ("adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"),
        "precision": _precisions(machine, card),
        "checkpointing": ("full", "every_2", "off", "every_4"),
        "attention": (attention_for(spec, cache, machine),),
        "kernels": ("none", "liger"),
        "adapter": ("fused",),
        "compile": ("off", "layers"),
        # In every pair of runs on an H100 the recorded one was as fast or faster
        # (benchmarks/results/cuda_graphs_h100_2026-11-27.json); without, a card has more memory.
        "cuda_graph": ("micro_batch", "off"),
        "allocator": _ALLOCATORS,
        "embedding": _embeddings(spec, machine),
        "packing": (False,),
        "fp32_upcast": (False,),
    }
    if spec.objective == "seq_len":
        axes["seq_len"] = _lengths(spec)
        axes["micro_batch"] = (1,)
    return axes


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


def attention_for(spec: Spec, cache: TraceCache | None, machine: Machine | None) -> str:
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


def adapter_for(axes: Mapping[str, tuple[Any, ...]], spec: Spec) -> str:
    """Return whose code multiplies with the adapter.

    The fused one wherever it goes: it computes what peft's does in fewer passes, and was faster in
    every pair of runs (benchmarks/results/fused_on_h100.json).
    """
    goes = spec.dropout == 0 and axes["method"] != ("full",) and "loop" not in axes["trainer"]
    return "fused" if goes else "peft"
