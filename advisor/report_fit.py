"""The answer to "will it fit?" as text for people."""

from __future__ import annotations

from tabulate import tabulate

from lora_advisor.advisor.fit import FitAnswer
from lora_advisor.advisor.largest import Largest
from lora_advisor.advisor.report import KNOWN, gib, interval_text
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.machine import GIB, Machine
from lora_advisor.probes.prediction import MemoryPrediction
from lora_advisor.probes.record import ProbeResult

_BAR_WIDTH = 40
_WORDS = {"fits": "yes", "does not fit": "no", "uncertain": "uncertain"}
#: Parts whose name in the trace says too little.
_NAMES = {"activations": "stored activations"}


def fit_text(answer: FitAnswer, *, machine: Machine) -> str:
    """Write the answer to "will it fit?": the verdict, why, and what else would."""
    from lora_advisor.advisor.arms import describe

    verdict = answer.prediction.verdict
    lines = [
        f"{_WORDS[verdict]}: {answer.config.model}, {describe(answer.config)}, on {machine.name}, "
        f"{gib(answer.limit_bytes)}",
        *_memory_lines(answer),
        f"speed {interval_text(answer.prediction.tokens_per_s)}",
        f"known how: {KNOWN[answer.prediction.evidence]}",
    ]
    if answer.note is not None:
        lines.append(answer.note)
    lines += ["", *_peak(answer, machine)]
    if answer.largest is not None:
        lines += ["", _largest_text(answer.largest, answer.config)]
    if verdict != "fits":
        lines += ["", _changes_text(answer)]
    return "\n".join(lines)


def _memory_lines(answer: FitAnswer) -> list[str]:
    memory, limit = answer.prediction.memory, answer.limit_bytes
    if answer.measured is not None and not memory.components:
        return [_measured_text(answer.measured)]
    lines = [
        f"if free to, the process would hold {gib(memory.process_bytes)}, at most "
        f"{gib(memory.process_upper_bytes)}; under a cap it gets by with "
        f"{gib(answer.least_bytes)}{_bound(memory)}; the limit is {gib(limit)}"
    ]
    if answer.prediction.verdict == "fits" and memory.process_bytes > limit:
        lines.append(
            "to stay within the limit the allocator will have to give cached memory back now and "
            "then, which is slower"
        )
    if answer.measured is not None:
        lines.append(_measured_text(answer.measured))
    return lines


def _bound(memory: MemoryPrediction) -> str:
    """Say so where the smallest cap survived was not worth finding out to the end."""
    if memory.allocated_bytes == memory.reserved_bytes:
        return ""
    if memory.needed_bytes == memory.reserved_bytes:
        return " or less"
    return " or more" if memory.needed_bytes == memory.allocated_bytes else ""


def _measured_text(result: ProbeResult) -> str:
    cap = "without a cap" if result.cap_bytes is None else f"under a cap of {gib(result.cap_bytes)}"
    if result.outcome == "out_of_memory":
        return f"it was run {cap} of the allocator and ran out of memory"
    if result.outcome != "ok":
        return f"it was run {cap} of the allocator: {result.outcome.replace('_', ' ')}"
    held = result.process_bytes or result.reserved_bytes
    return f"it was run {cap} of the allocator" + (
        "" if held is None else f" and the process held {gib(held)}"
    )


def _peak(answer: FitAnswer, machine: Machine) -> list[str]:
    memory = answer.prediction.memory
    if not memory.components:
        return ["what the peak is made of is unknown: that takes a trace"]
    context = "Python and its libraries" if machine.kind == "cpu" else "CUDA context"
    return [
        f"peak at: {memory.instant} ({gib(memory.allocated_bytes)} live, "
        f"{gib(memory.reserved_bytes)} held)",
        memory_bars(memory, context=context),
    ]


def memory_bars(memory: MemoryPrediction, *, context: str = "CUDA context") -> str:
    """Write the parts of the process at its peak as bars; they sum to it."""
    parts = memory_parts(memory, context=context)
    largest = max((size for _, size in parts), default=1) or 1
    rows = [
        (name, f"{size / GIB:.2f}", "#" * round(_BAR_WIDTH * size / largest))
        for name, size in parts
    ]
    rows.append(("process", f"{memory.process_bytes / GIB:.2f}", ""))
    return tabulate(rows, headers=["part", "GiB", ""], tablefmt="plain", disable_numparse=True)


def memory_parts(
    memory: MemoryPrediction, *, context: str = "CUDA context"
) -> list[tuple[str, int]]:
    """Return the parts of the process at its peak in bytes, largest first; they sum to it."""
    live = {_NAMES.get(name, name): size for name, size in memory.components.items()}
    live["cache and fragmentation"] = memory.reserved_bytes - memory.allocated_bytes
    live[context] = memory.process_bytes - memory.reserved_bytes
    # Where probes have taught the model, the parts are still those of the trace.
    live["learnt from probes"] = memory.allocated_bytes - sum(memory.components.values())
    return sorted((part for part in live.items() if part[1]), key=lambda part: -part[1])


def _largest_text(found: Largest, config: RunConfig) -> str:
    def said(value: int | None, searched_to: int) -> str:
        if value is None:
            return "none"
        return f"at least {value:,}" if value == searched_to else f"{value:,}"

    sequence = said(found.seq_len, found.seq_len_searched_to)
    batch = said(found.micro_batch, found.micro_batch_searched_to)
    return (
        f"longest sequence that fits at micro-batch {config.micro_batch}: {sequence}"
        f"{'' if found.seq_len is None else ' tokens'}\n"
        f"largest micro-batch that fits at {config.seq_len:,} tokens: {batch}"
    )


def _changes_text(answer: FitAnswer) -> str:
    changes = list(answer.changes) + ([answer.combined] if answer.combined else [])
    if not changes:
        return (
            "no change of method, batch or checkpointing makes it fit; shorten --seq or take a "
            "smaller model"
        )
    rows = [
        [
            change.name,
            f"{change.saved_bytes / GIB:.2f}",
            "unknown" if change.slower is None else f"{100 * change.slower:+.0f} %",
            f"{change.prediction.memory.process_upper_bytes / GIB:.2f}",
        ]
        for change in changes
    ]
    headers = ["what would make it fit", "saves GiB", "slower", "then at most GiB"]
    return tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True)
