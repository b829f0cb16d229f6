"""Run a factorial in random order, and go on where an earlier call of it was stopped.

All state is the append-only record of probes in the bench's folder: what was measured, how often,
and what did not run are read from it, so a bench that is killed loses the run that was under way.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_advisor.advisor.bench_design import Cell, Design
from lora_advisor.probes.architectures import Architecture
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import StackError
from lora_advisor.probes.forkserver import ForkServer
from lora_advisor.probes.machine import GIB, Machine, Stack
from lora_advisor.probes.record import ProbeResult, read_records
from lora_advisor.probes.runner import capped_bytes, context_bytes_of, run_probe

Probe = Callable[[RunConfig], ProbeResult]
Say = Callable[[str], None]

#: After how many endings of a kind a cell is not tried again. What ran out of memory or of time
#: does so every time; a failure may be an accident once; a run beside another process says nothing.
_TRIES = {"out_of_memory": 1, "timed_out": 1, "failed": 2, "contended": 3}
#: More than a plan's probes have: fp16's loss scaling may skip the optimizer in its first steps,
#: until it has halved its scale far enough, and a skipped step is neither as slow nor as large.
_WARMUP_STEPS = 5
#: The memory left to a bench may differ by this much between calls that go on with it.
_SAME_LIMIT = 0.02


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run.

    Attributes:
        cell: What ran.
        repeat: Which repeat of its cell this is, from 1; None for a run that measured nothing.
        result: What came of it.
    """

    cell: Cell
    repeat: int | None
    result: ProbeResult

    @property
    def ending(self) -> str:
        """How it ended; a run beside another process is "contended", however it ended."""
        return "contended" if self.result.contended else self.result.outcome


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A bench as far as it came.

    Attributes:
        design: What was to be run.
        architecture: The model.
        machine: Where it ran.
        stack: With what.
        device: "cuda" or "cpu".
        vram_bytes: Memory that the user set; None for the device's own.
        cap_bytes: What the device's allocator (on a CPU: the process) is allowed of it.
        runs: What ran, in that order.
    """

    design: Design
    architecture: Architecture
    machine: Machine
    stack: Stack
    device: str
    vram_bytes: int | None
    cap_bytes: int
    runs: tuple[Run, ...] = ()

    @property
    def measured(self) -> tuple[Run, ...]:
        """The runs that count."""
        return tuple(run for run in self.runs if run.repeat is not None)

    @property
    def missing(self) -> int:
        """How many runs are left to do."""
        return sum(1 for _ in pending(self.design, self.runs))

    def runs_of(self, cell: Cell) -> tuple[Run, ...]:
        """Return the runs of a cell."""
        return tuple(run for run in self.runs if run.cell == cell)

    def state_of(self, cell: Cell) -> str:
        """Return why a cell has no figures, or "ok"."""
        if cell.config is None:
            return "not possible"
        runs = self.runs_of(cell)
        if any(run.repeat is not None for run in runs):
            return "ok"
        return (given_up(runs) or "not run yet").replace("_", " ")


def prober(bench: Bench, record: Path, *, steps: int, server: ForkServer | None = None) -> Probe:
    """Return what runs a configuration of a bench in a child process here.

    Args:
        bench: The bench.
        record: File the results are appended to.
        steps: Steps to measure.
        server: Forks the child, which saves it the imports; without it, a process is started.
    """

    def probe(config: RunConfig) -> ProbeResult:
        return run_probe(
            config,
            bench.architecture,
            bench.machine,
            bench.stack,
            cap_bytes=bench.cap_bytes,
            record=record,
            device=bench.device,
            warmup_steps=_WARMUP_STEPS,
            measured_steps=steps,
            max_seconds=30.0,
            server=server,
        )

    return probe


def assign(design: Design, results: Sequence[ProbeResult]) -> tuple[Run, ...]:
    """Give each result its cell and its repeat; what belongs to no cell is left out."""
    counts: Counter[tuple[str, ...]] = Counter()
    runs = []
    for result in results:
        cell = design.cell_of(result.config)
        if cell is None or result.outcome == "interrupted":
            continue
        counted = result.outcome == "ok" and bool(result.tokens_per_s) and not result.contended
        if counted:
            counts[cell.levels] += 1
        repeat = counts[cell.levels] if counted else None
        runs.append(Run(cell=cell, repeat=repeat, result=result))
    return tuple(runs)


def given_up(runs: Sequence[Run]) -> str | None:
    """Return the ending for which a cell with these runs is not tried again; None if it is."""
    endings = Counter(run.ending for run in runs if run.repeat is None)
    return next((ending for ending, tries in _TRIES.items() if endings[ending] >= tries), None)


def pending(design: Design, runs: Sequence[Run]) -> Iterator[Cell]:
    """Yield the cells left to run, repeat by repeat, each in its random order."""
    by_cell: dict[tuple[str, ...], list[Run]] = {cell.levels: [] for cell in design.cells}
    for run in runs:
        by_cell[run.cell.levels].append(run)
    for repeat in range(1, design.repeats + 1):
        for cell in design.order(repeat):
            mine = by_cell[cell.levels]
            done = sum(run.repeat is not None for run in mine)
            if cell.config is not None and done < repeat and given_up(mine) is None:
                yield cell


def run_bench(bench: Bench, probe: Probe, *, budget_s: float, say: Say) -> Iterator[Bench]:
    """Run what is left until it is done or the time is spent, and yield the bench after each run.

    A run is not begun when it is expected to end after the budget; the first always is.

    Raises:
        BusyError: Another process uses the GPU; all runs before it are on disk.
    """
    started, done = time.monotonic(), 0
    while (cell := next(pending(bench.design, bench.runs), None)) is not None:
        spent = time.monotonic() - started
        if done and spent + spent / done > budget_s:
            return
        assert cell.config is not None
        result = probe(cell.config)
        done += 1
        results = [*(run.result for run in bench.runs), result]
        bench = dataclasses.replace(bench, runs=assign(bench.design, results))
        say(_progress(bench, cell, result, (time.monotonic() - started) / done))
        yield bench


def _progress(bench: Bench, cell: Cell, result: ProbeResult, run_s: float) -> str:
    from lora_advisor.advisor.report import duration

    missing = bench.missing
    if result.outcome != "ok" or result.tokens_per_s is None:
        ending = result.outcome.replace("_", " ")
        ending += f" ({result.detail})" if result.detail else ""
    else:
        memory = result.reserved_bytes or result.process_bytes or 0
        ending = f"{result.tokens_per_s:,.0f} tokens/s, {memory / GIB:.2f} GiB"
    left = f"; {missing} left, about {duration(missing * run_s)}" if missing else ""
    return f"run {len(bench.runs)}: {', '.join(cell.levels)}: {ending}{left}"


def go_on(bench: Bench, record: Path, *, say: Say) -> Bench:
    """Take up what an earlier call measured in the same folder.

    The limit stays that of the runs before, so that all runs had the same.

    Args:
        bench: The bench, nothing run yet.
        record: The record of the earlier call; there may be none.
        say: Called with a line of what was found.

    Raises:
        DataError: The file is no record of this format.
        StackError: It is of another machine, stack, model or limit.
    """
    results = read_records(record)
    if not results:
        return bench
    for result in results:
        _check_same(record, "machine", result.machine.to_json(), bench.machine.to_json())
        _check_same(record, "stack", result.stack.to_json(), bench.stack.to_json())
        if result.architecture != bench.architecture.fingerprint:
            raise StackError(
                f"`{record}` was measured with another model ({result.config.model}): give another "
                "--out."
            )
    cap = results[-1].cap_bytes or bench.cap_bytes
    smaller = bench.cap_bytes < cap * (1 - _SAME_LIMIT)
    larger = bench.cap_bytes > cap * (1 + _SAME_LIMIT)
    if smaller or (larger and bench.vram_bytes is not None):
        raise StackError(
            f"`{record}` was measured with {cap / GIB:.2f} GiB for the process's tensors, here are "
            f"{bench.cap_bytes / GIB:.2f}: give the same --vram, or another --out."
        )
    runs = assign(bench.design, results)
    others = sum(bench.design.cell_of(r.config) is None for r in results)
    apart = f"; {others} of other settings are left out" if others else ""
    say(f"{len(runs)} earlier runs taken up{apart}")
    return dataclasses.replace(bench, cap_bytes=cap, runs=runs)


def _check_same(record: Path, what: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    changed = [
        f"{name} {there[name] or 'missing'} there, {here[name] or 'missing'} here"
        for name in here
        if there.get(name) != here[name]
    ]
    if changed:
        raise StackError(
            f"`{record}` was measured with another {what} ({'; '.join(changed)}): give another "
            "--out."
        )


def cap_of(machine: Machine, *, vram_bytes: int, reserve_bytes: int) -> int:
    """Return what the device's allocator (on a CPU: the process) is allowed.

    Raises:
        UsageError: Nothing is left.
    """
    context = context_bytes_of(machine) or 0
    return capped_bytes(vram_bytes, context, reserve_bytes)
