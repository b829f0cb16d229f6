"""Run the real training step on fake tensors and record what it would allocate on a GPU.

The trainer of `finetune.build_trainer` runs on PyTorch's fake tensors: shapes, dtypes and lifetimes
are real, no memory is touched, no GPU and no weights are needed. Each storage that appears is an
allocation, each that dies a release. Where CUDA's semantics differ from the CPU's that the fake
tensors stand on, `cuda_semantics` says so.

What is not covered: compiled graphs (traced as their eager form), offloaded checkpoints' pinned
host memory, flash_attention_2's own package (traced as PyTorch's flash kernel, which it equals).
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_advisor.probes.architectures import Architecture
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.dataset import random_rows
from lora_advisor.probes.errors import UsageError
from lora_advisor.probes.finetune import Schedule, build_trainer, placeholder_tokenizer
from lora_advisor.probes.weights import fill, skeleton, weights_dtype

if TYPE_CHECKING:
    import torch

PHASES = ("load", "forward", "backward", "optimizer")
OWNERS = ("weights", "adapter", "gradient", "optimizer", "activation")


@dataclass(frozen=True, slots=True)
class Event:
    """One allocation or release.

    Attributes:
        block: Number of the storage; a release carries the number of its allocation.
        size: Bytes asked for; negative for a release.
        phase: One of PHASES.
    """

    block: int
    size: int
    phase: str


@dataclass(frozen=True, slots=True)
class Work:
    """What a phase asks of the device and of the host, summed over one step.

    Attributes:
        launches: Kernels launched.
        matmul_flops: Floating-point operations of matrix products in the precision of the step.
        attention_flops: Those of the attention kernels.
        bytes_moved: Bytes read and written by all other kernels.
    """

    launches: float = 0.0
    matmul_flops: float = 0.0
    attention_flops: float = 0.0
    bytes_moved: float = 0.0

    def __add__(self, other: Work) -> Work:
        """Add term by term."""
        return Work(
            self.launches + other.launches,
            self.matmul_flops + other.matmul_flops,
            self.attention_flops + other.attention_flops,
            self.bytes_moved + other.bytes_moved,
        )


@dataclass(frozen=True)
class Trace:
    """What one training step allocates and computes.

    Attributes:
        events: Allocations and releases in order: loading, two steps.
        owners: Owner of each block that is alive when a step ends, by block number.
        work: Work of the last step by phase.
        trainable: Number of trained parameters.
    """

    events: tuple[Event, ...]
    owners: dict[int, str]
    work: dict[str, Work]
    trainable: int


def trace_step(config: RunConfig, architecture: Architecture, *, layers: int | None = None) -> Trace:
    """Trace two steps of a configuration.

    Args:
        config: What to trace.
        architecture: The model's figures.
        layers: Trace with only this many decoder layers; None for all.

    Raises:
        UsageError: The configuration belongs to another engine.
    """
    if not config.is_buildable:
        raise UsageError(
            f"`trainer` {config.trainer!r} is another engine, whose step cannot be built here."
        )
    from torch._subclasses.fake_tensor import FakeTensorMode

    from lora_advisor.probes.cuda_semantics import cuda_semantics, fake_quantise, traced_config

    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    recorder = Recorder()
    model = skeleton(config, architecture, "cpu", layers=layers)
    with _quiet(), fake_mode, cuda_semantics(config), recorder:
        fill(model, weights_dtype(config), "cpu", fake_quantise)
        vocab_size = model.config.get_text_config().vocab_size
        trainer = build_trainer(
            traced_config(config),
            model,
            rows=[{"input_ids": [0, 0], "labels": [0, 0]}],
            tokenizer=placeholder_tokenizer(vocab_size),
            schedule=Schedule(max_steps=2),
            device="cpu",
            callbacks=[_phase_callback(recorder)],
        )
        trainer.remove_callback(_printer())
        batches = [_fake_batch(trainer, config) for _ in range(2 * config.accumulation)]
        trainer.get_train_dataloader = lambda: _FakeLoader(batches)
        _mark_backward(trainer, recorder)
        trainer.train()
        owners = recorder.owners(trainer)
        trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        events, work = tuple(recorder.events), dict(recorder.work)
        recorder.closed = True
        del trainer, model, batches
    gc.collect()
    return Trace(events=events, owners=owners, work=work, trainable=trainable)


class _FakeLoader:
    """Stands for the data loader: batches that are fake already."""

    def __init__(self, batches: Sequence[dict[str, Any]]) -> None:
        self.batches = batches
        self.dataset = range(1_000_000)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter([dict(batch) for batch in self.batches])


def _fake_batch(trainer: Any, config: RunConfig) -> dict[str, Any]:
    """Return the batch the trainer's own collator makes, as fake tensors."""
    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), unset_fake_temporarily():
        rows = random_rows(config.micro_batch, config.seq_len, 4)
        if config.packing:
            rows = [{**row, "seq_lengths": [config.seq_len]} for row in rows]  # type: ignore[dict-item]
        batch = trainer.data_collator(rows)
    made: dict[str, Any] = {}
    for key, value in batch.items():
        made[key] = torch.zeros(value.shape, dtype=value.dtype) if torch.is_tensor(value) else value
    return made


def _printer() -> Any:
    from transformers import PrinterCallback

    return PrinterCallback


def _mark_backward(trainer: Any, recorder: Recorder) -> None:
    original: Callable[..., Any] = trainer.accelerator.backward

    def backward(*args: Any, **kwargs: Any) -> None:
        recorder.phase = "backward"
        original(*args, **kwargs)
        recorder.phase = "forward"

    trainer.accelerator.backward = backward


def _phase_callback(recorder: Recorder) -> Any:
    from transformers import TrainerCallback

    class Phases(TrainerCallback):
        """Tells the recorder which part of the step runs."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            recorder.phase = "forward"
            recorder.work.clear()

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            recorder.phase = "optimizer"

        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            recorder.phase = "optimizer"

    return Phases()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import warnings

    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


def _dispatch_mode() -> type:
    from torch.utils._python_dispatch import TorchDispatchMode

    return TorchDispatchMode


class Recorder(_dispatch_mode()):  # type: ignore[misc]
    """Notes each storage when it first appears and when it dies, and the work of each operation."""

    def __init__(self) -> None:
        """Start in the loading phase with nothing recorded."""
        super().__init__()
        self.events: list[Event] = []
        self.work: dict[str, Work] = {}
        self.phase = "load"
        self.closed = False
        self._known: dict[int, int] = {}  # storage's address -> block
        self._count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation and note what it allocates."""
        from lora_advisor.probes.cuda_semantics import answer, describe

        kwargs = kwargs or {}
        known = answer(func, args, kwargs)
        if known is not NotImplemented:
            result = known
        else:
            cost = describe(func, args, kwargs)
            temporaries = [self.allocate(size) for size in cost.temporaries]
            result = func(*args, **kwargs)
            for block in temporaries:
                self.release(block)
            self.work[self.phase] = self.work.get(self.phase, Work()) + cost.work(result)
        self._note(result)
        return result

    def allocate(self, size: int) -> tuple[int, int]:
        """Note an allocation that has no tensor and return its handle."""
        self._count += 1
        self.events.append(Event(self._count, size, self.phase))
        return self._count, size

    def release(self, block: tuple[int, int]) -> None:
        """Note the release of an allocation."""
        if not self.closed:
            self.events.append(Event(block[0], -block[1], self.phase))

    def _note(self, result: Any) -> None:
        import torch

        if isinstance(result, torch.Tensor):
            if result.device.type == "meta" or result.layout != torch.strided:
                return
            storage = result.untyped_storage()
            key = storage._cdata
            if key in self._known or storage.nbytes() == 0:
                return
            block = self.allocate(storage.nbytes())
            self._known[key] = block[0]
            weakref.finalize(storage, self._died, key, block)
        elif isinstance(result, list | tuple):
            for part in result:
                self._note(part)

    def _died(self, key: int, block: tuple[int, int]) -> None:
        self._known.pop(key, None)
        self.release(block)

    def owners(self, trainer: Any) -> dict[int, str]:
        """Return the owner of each block that the trainer still holds."""
        owned: dict[int, str] = {}

        def claim(tensor: Any, owner: str) -> None:
            block = self._known.get(tensor.untyped_storage()._cdata)
            if block is not None:
                owned.setdefault(block, owner)

        for parameter in trainer.model.parameters():
            claim(parameter, "adapter" if parameter.requires_grad else "weights")
            state = getattr(parameter, "quant_state", None)
            for tensor in _quant_tensors(state):
                claim(tensor, "weights")
        for buffer in trainer.model.buffers():
            claim(buffer, "weights")
        for state in trainer.optimizer.state.values():
            for value in state.values():
                if hasattr(value, "untyped_storage") and value.device.type != "meta":
                    claim(value, "optimizer")
        return owned


def _quant_tensors(state: Any) -> list[torch.Tensor]:
    if state is None:
        return []
    own = [state.absmax, state.code, state.offset]
    nested = _quant_tensors(state.state2)
    return [tensor for tensor in own if tensor is not None] + nested
