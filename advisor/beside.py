"""A callback for anyone's Trainer: tokens/s and memory as they come, beside what was predicted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from lora_advisor.advisor.watch import WARMUP_STEPS
from lora_advisor.probes.machine import GIB
from lora_advisor.probes.meter import peak_resident_bytes

if TYPE_CHECKING:
    from lora_advisor.probes.plan import Plan

#: Rows that fill less of a sequence than this are said to: the prediction is for full ones.
_FULL = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Reached:
    """What was measured up to a step.

    Attributes:
        step: Optimizer steps done.
        steps: Optimizer steps in all.
        tokens_per_s: Tokens per second, padding included; None until enough steps have run.
        filled: Mean length of a row, padding included, as a share of the planned sequence length;
            None where nothing was seen.
        peak_bytes: On a card what the allocator has held at most, else the process's peak resident
            size.
    """

    step: int
    steps: int
    tokens_per_s: float | None
    filled: float | None
    peak_bytes: int | None


class Beside(TrainerCallback):
    """Measures steps and memory of a running Trainer; tells them after some steps and at the end.

    A step's time runs from its begin to the device's end of it: loading rows, evaluations and
    checkpoints are no part of it, nor are the first steps. Tokens are counted where they enter the
    model. The last `Reached` is kept in `reached`.
    """

    def __init__(self, plan: Plan, *, after: int, say: Callable[[str], object]) -> None:
        """Take what was predicted, and whom to tell."""
        self._plan, self._after, self._say = plan, after, say
        self._hook: Any = None
        self._begin = self._seconds = 0.0
        self._done = self._tokens = self._rows = self._all_tokens = self._timed_tokens = 0
        self.reached: Reached | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count what enters the model from now on."""
        model = kwargs["model"]
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)
        config = self._plan.chosen.config
        if config.precision == "fp16" and config.trainer == "trl":
            from lora_advisor.probes.finetune import cast_up_adapters

            cast_up_adapters(model)

    def _count(self, model: Any, args: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids")
        if model.training and ids is not None:
            self._tokens += ids.numel()
            self._rows += ids.shape[0]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._tokens = 0
        self._begin = perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock, and tell where it is time for that."""
        _wait(args)
        self._done += 1
        self._all_tokens += self._tokens
        if self._done > WARMUP_STEPS:
            self._seconds += perf_counter() - self._begin
            self._timed_tokens += self._tokens
        if self._done == self._after and state.global_step < state.max_steps:
            self._tell(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell what has come of it all."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self._tell(args, state)

    def _tell(self, args: Any, state: Any) -> None:
        seq_len = self._plan.chosen.config.seq_len
        self.reached = Reached(
            step=state.global_step,
            steps=state.max_steps,
            tokens_per_s=self._timed_tokens / self._seconds if self._seconds else None,
            filled=self._all_tokens / self._rows / seq_len if self._rows else None,
            peak_bytes=_peak_bytes(args),
        )
        self._say(beside_text(self._plan, self.reached, on_card=_on_card(args)))


def beside_text(plan: Plan, reached: Reached, *, on_card: bool) -> str:
    """Return what was measured beside what was predicted, in one line."""
    chosen = plan.chosen
    speed = chosen.prediction.tokens_per_s
    measured = f"{reached.tokens_per_s:,.0f}" if reached.tokens_per_s else "not yet measured"
    if chosen.measured is not None and chosen.measured.tokens_per_s is not None:
        expected = f"{chosen.measured.tokens_per_s:,.0f} in the plan's proof"
    elif speed is not None:
        expected = f"{speed.value:,.0f} predicted, {speed.low:,.0f} to {speed.high:,.0f}"
    else:
        expected = "no prediction"
    memory = chosen.prediction.memory
    what, bytes_ = "allocator", memory.reserved_bytes
    if not on_card:
        what, bytes_ = "process", memory.process_bytes
    peak = "unknown" if reached.peak_bytes is None else f"{reached.peak_bytes / GIB:.2f} GiB"
    line = (
        f"lora-advisor, step {reached.step} of {reached.steps}: tokens/s {measured} ({expected}); "
        f"{what} {peak} ({bytes_ / GIB:.2f} GiB predicted, {memory.evidence})"
    )
    if reached.filled is not None and reached.filled < _FULL:
        line += (
            f"; rows fill {reached.filled:.0%} of {chosen.config.seq_len} tokens, the prediction "
            "is for full ones"
        )
    return line


def _on_card(args: Any) -> bool:
    return bool(args.device.type == "cuda")


def _wait(args: Any) -> None:
    if _on_card(args):
        import torch

        torch.cuda.synchronize()


def _peak_bytes(args: Any) -> int | None:
    if not _on_card(args):
        return peak_resident_bytes()
    import torch

    return int(torch.cuda.max_memory_reserved())
