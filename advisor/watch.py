"""Watch a trainer at work: time, tokens and loss of its steps, reported as `Progress`."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

from transformers import Trainer, TrainerCallback

from lora_advisor.advisor.outcome import Measured, Progress
from lora_advisor.advisor.processes import here
from lora_advisor.probes.meter import Memory, Meter
from lora_advisor.probes.packed_rows import useful_tokens

#: Seconds between two reports.
REPORT_S = 1.0

#: Steps at the start whose times are left out: kernels are chosen, caches filled.
WARMUP_STEPS = 3

#: Steps that the pace is taken from.
_RECENT = 50


class Watch(TrainerCallback):
    """Counts and times the steps; tells `progress` of them and `saved` of checkpoints.

    A step's time runs from the end of the one before and includes loading its rows, but neither
    reports nor checkpoints. Of several processes all count: tokens and power are sums, memory is
    that of the one that holds most, and the first says when a report is due.
    """

    def __init__(
        self,
        meter: Meter,
        *,
        progress: Callable[[Progress], None],
        saved: Callable[[int, float], None],
        seconds_before: float,
        power_w: Callable[[], float | None] = lambda: None,
    ) -> None:
        """Take whom to tell; `seconds_before` were spent by processes that were interrupted."""
        self._meter = meter
        self._progress = progress
        self._saved = saved
        self._seconds_before = seconds_before
        self._power_w = power_w
        self._peak = Memory()
        self._begin = self._mark = self._reported = perf_counter()
        self._end: float | None = self._begin  # nothing is spent until training begins
        self._tokens: list[Any] = []
        self._padded = 0
        self._steps: list[tuple[float, int, int]] = []

    def attach(self, trainer: Trainer) -> None:
        """Count the tokens of every micro-batch the trainer takes."""
        plain = trainer.training_step

        def counted(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self._padded += inputs["input_ids"].numel()
            self._tokens.append(useful_tokens(inputs))  # read at the step's end
            return plain(model, inputs, *args, **kwargs)

        vars(trainer)["training_step"] = counted  # over the method of the class

    @property
    def seconds(self) -> float:
        """Time spent in training, by processes that were interrupted too."""
        return (
            self._seconds_before
            + (perf_counter() if self._end is None else self._end)
            - self._begin
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._end = None
        self._begin = self._mark = self._reported = perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what is done within: its time and its memory are no part of the steps."""
        self._peak = self._memory()
        start = perf_counter()
        yield
        now = perf_counter()
        self._begin += now - start
        self._mark += now - start

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note a step, and ask for a report when it is time for one."""
        self._meter.synchronize()
        now = perf_counter()
        useful = sum(map(int, self._tokens))
        seen = here().numbers(useful, self._padded, now - self._reported >= REPORT_S)
        tokens, padded = (int(sum(one[at] for one in seen)) for at in (0, 1))
        self._steps.append((now - self._mark, tokens, padded))
        self._tokens, self._padded = [], 0
        self._mark = now
        if seen[0][2] or state.global_step in (1, state.max_steps):
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report."""
        logs = kwargs["logs"]
        if "loss" not in logs or not self._steps:
            return
        recent = self._steps[-_RECENT:]
        seconds = sum(step[0] for step in recent)
        pace = statistics.median(step[0] for step in recent)
        self._progress(
            Progress(
                step=state.global_step,
                steps=state.max_steps,
                loss=float(logs["loss"]),
                tokens_per_s=sum(step[1] for step in recent) / seconds,
                padded_tokens_per_s=sum(step[2] for step in recent) / seconds,
                peak_bytes=self._peak_bytes(),
                power_w=_all_known(sum, self._power_w()),
                seconds_left=(state.max_steps - state.global_step) * pace,
            )
        )
        self._reported = self._mark = perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell of a checkpoint."""
        self._saved(state.global_step, self.seconds)
        self._mark = perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self._end = perf_counter()

    def _memory(self) -> Memory:
        """Return the peaks so far; an evaluation sets those of the allocator back."""
        now, before = self._meter.memory(), self._peak

        def larger(name: str) -> int | None:
            both: list[int | None] = [getattr(now, name), getattr(before, name)]
            sizes = [size for size in both if size is not None]
            return max(sizes, default=None)

        return Memory(
            allocated_bytes=larger("allocated_bytes"),
            reserved_bytes=larger("reserved_bytes"),
            process_bytes=larger("process_bytes"),
        )

    def _peak_bytes(self) -> int | None:
        memory = self._memory()
        held = memory.reserved_bytes if memory.process_bytes is None else memory.process_bytes
        return _bytes(held)

    def measured(self) -> Measured:
        """Return what was measured, once training has ended."""
        memory = self._memory()
        steps = self._steps[WARMUP_STEPS:]

        def median(values: list[float]) -> float | None:
            return statistics.median(values) if values else None

        return Measured(
            tokens_per_s=median([tokens / seconds for seconds, tokens, _ in steps]),
            padded_tokens_per_s=median([padded / seconds for seconds, _, padded in steps]),
            step_s=median([seconds for seconds, _, _ in steps]),
            steps_measured=len(steps),
            train_seconds=self.seconds,
            peak_bytes=_bytes(memory.process_bytes),
            allocated_bytes=_bytes(memory.allocated_bytes),
            reserved_bytes=_bytes(memory.reserved_bytes),
        )


def _all_known(join: Callable[[list[float]], float], value: float | None) -> float | None:
    """Return what the values of all processes come to; None where one does not know its own."""
    values = [one for (one,) in here().numbers(-1.0 if value is None else value)]
    return None if min(values) < 0 else join(values)


def _bytes(size: int | None) -> int | None:
    largest = _all_known(max, size)
    return None if largest is None else int(largest)
