"""What a merge needs, before anything is written."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_advisor.advisor.stored_weights import SIZES, StoredWeights, stored_weights
from lora_advisor.advisor.trained_adapter import (
    LowRank,
    TrainedAdapter,
    base_of,
    find_adapter,
    low_ranks,
)
from lora_advisor.probes.architectures import Architecture
from lora_advisor.probes.errors import DataError, OutputError, UnavailableError, UsageError

#: Largest file of the result, and so most of what is held: transformers wrote 5 GB for long.
SHARD_BYTES = 2_000_000_000
#: What imports, activations and logits of the check take, about.
BESIDE_BYTES = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """What will be done, and what it needs.

    Attributes:
        adapter: The adapter.
        base: The base model, its weights in a folder.
        weights: These weights.
        dtype: Type of the result: "bf16", "fp16" or "fp32".
        shard_bytes: Largest file of the result.
        low_ranks: What is added, by weight; None where peft has to merge.
        memory_bytes: Memory it needs.
        disk_bytes: What it writes.
    """

    adapter: TrainedAdapter
    base: Architecture
    weights: StoredWeights = field(repr=False)
    dtype: str
    shard_bytes: int
    low_ranks: Mapping[str, LowRank] | None = field(repr=False)
    memory_bytes: int
    disk_bytes: int


def plan_merge(
    path: Path, *, base: str | None = None, dtype: str | None = None, shard_bytes: int = SHARD_BYTES
) -> MergePlan:
    """Find out what a merge needs; nothing is written.

    Args:
        path: Folder of a training, or of an adapter.
        base: The base model; None for the one the adapter names.
        dtype: Type of the result; None for the base's, and bf16 for a base in fp32.
        shard_bytes: Largest file of the result.

    Raises:
        AdvisorError: Adapter or base is missing, or cannot be merged.
    """
    adapter = find_adapter(path)
    architecture = base_of(adapter, base)
    assert architecture.weights is not None
    weights = stored_weights(Path(architecture.weights))
    dtype = dtype or ("bf16" if weights.dtype == "fp32" else weights.dtype)
    added = low_ranks(adapter)
    if added is not None and not set(added) <= set(weights.tensors):
        added = None
    disk = sum(t.bytes_as(weights.type_of(name, dtype)) for name, t in weights.tensors.items())
    largest = max(tensor.count for tensor in weights.tensors.values())
    # A file of the result; the largest weight that changes, what is added and their sum, in fp32.
    changed = max((weights.tensors[name].count for name in added or ()), default=0)
    held = min(disk, max(shard_bytes, largest * SIZES[dtype])) + 3 * changed * SIZES["fp32"]
    if added is not None:
        _check_shapes(added, weights, architecture.name)
    return MergePlan(
        adapter=adapter,
        base=architecture,
        weights=weights,
        dtype=dtype,
        shard_bytes=shard_bytes,
        low_ranks=added,
        # The check widens one weight at a time.
        memory_bytes=BESIDE_BYTES + max(disk if added is None else held, largest * SIZES["fp32"]),
        disk_bytes=disk,
    )


def _check_shapes(added: Mapping[str, LowRank], weights: StoredWeights, name: str) -> None:
    for weight, low_rank in added.items():
        shape = weights.tensors[weight].shape
        if low_rank.shape != shape:
            raise DataError(
                f"the adapter must fit the base model, but changes {weight} of shape "
                f"{low_rank.shape}, which in `{name}` has {shape}; give its own base with --base."
            )


def check_output(output: Path) -> None:
    """Refuse a folder that holds something, or whose place cannot be written.

    Raises:
        UsageError: It holds something.
        OutputError: It cannot be made.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"`{output}` must be a new or empty folder, but holds something.")
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"`{output}` must be a place that can be written, but {error}.") from None


def check_room(plan: MergePlan, output: Path) -> tuple[int, int]:
    """Return free bytes of memory and disk; refuse a merge that has too few.

    Raises:
        UnavailableError: There is too little memory.
        OutputError: There is too little disk.
    """
    import psutil

    memory = int(psutil.virtual_memory().available)
    disk = shutil.disk_usage(output.absolute().parent).free
    if memory < plan.memory_bytes:
        raise UnavailableError(
            f"the merge needs {gb(plan.memory_bytes)} of memory, but {gb(memory)} are free; end "
            "other programs, or give a smaller --max-shard-size."
        )
    if disk < plan.disk_bytes:
        raise OutputError(
            f"`{output}` must have room for {gb(plan.disk_bytes)}, but {gb(disk)} are free."
        )
    return memory, disk


def gb(size: int) -> str:
    """Write a size for people who compare it with files."""
    return f"{size / 1e9:.1f} GB"
