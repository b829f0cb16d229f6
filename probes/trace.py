"""Run the real training step on fake tensors and record what it would allocate on a GPU.

The trainer of `finetune.build_trainer` runs on PyTorch's fake tensors: shapes, dtypes and lifetimes
are real, no memory is touched, no GPU and no weights are needed. Each storage that appears is an
allocation, each that dies a release. Where CUDA's semantics differ from the CPU's that the fake
tensors stand on, `cuda_semantics` says so.

What is not covered: a model compiled as a whole (traced as its eager form), offloaded checkpoints'
pinned host memory, flash_attention_2's own package (traced as PyTorch's flash kernel, which it
equals).
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lora_advisor.probes.architectures import Architecture
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.dataset import random_rows
from lora_advisor.probes.errors import AdvisorError, UntraceableError, UsageError
from lora_advisor.probes.events import Event, Trace, Work
from lora_advisor.probes.finetune import (
    Schedule,
    build_trainer,
    decoder_layers,
    padding_tokenizer,
)
from lora_advisor.probes.preference import as_trained
from lora_advisor.probes.saved_hooks import counted_hooks
from lora_advisor.probes.weights import fill, loaded_bytes, skeleton, weights_dtype

if TYPE_CHECKING:
    import torch

    from lora_advisor.probes.kernel_costs import Cost


def trace_step(
    config: RunConfig,
    architecture: Architecture,
    *,
    layers: int | None = None,
    capability: str | None = None,
) -> Trace:
    """Trace two steps of a configuration, each of one micro-batch.

    With accumulation the second step keeps the first one's gradients, which is the state that every
    micro-batch but the first of a step meets; `Trace.work` is that of one micro-batch and one
    optimizer step.

    Args:
        config: What to trace.
        architecture: The model's figures.
        layers: Trace with only this many decoder layers; None for all.
        capability: Of the card, which decides attention kernels and workspaces; None for a current
            one.

    Raises:
        UsageError: The configuration belongs to another engine, or a library refuses it.
        UntraceableError: The step depends on values, or fails for want of them.
    """
    if not config.is_buildable:
        raise UsageError(
            f"`trainer` {config.trainer!r} is another engine, whose step cannot be built here."
        )
    freeze_libraries()
    try:
        with _process_as_it_was():
            return _trace(config, architecture, layers, capability)
    except AdvisorError:
        raise
    except Exception as error:  # what the libraries raise is theirs to choose
        if os.environ.get("LORA_ADVISOR_DEBUG"):
            raise
        raise _refusal(architecture.name, error) from error
    finally:
        gc.collect()
        _freeze_what_came()


def _refusal(name: str, error: Exception) -> UsageError:
    """Say what a failure within a step means to the caller."""
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
    )

    if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
        return UntraceableError(
            f"`{name}` picks rows by their values ({error.func}), which a trace has not; "
            "probe it on a card."
        )
    first = (str(error).strip().splitlines() or [""])[0]
    reason = f"{type(error).__name__}: {first}"
    if isinstance(error, RuntimeError):
        # PyTorch's own kind: a guessed value (`cuda_semantics.answer`) may be behind it.
        return UntraceableError(
            f"the step of `{name}` cannot be traced ({reason}); probe it on a card."
        )
    return UsageError(f"`{name}` cannot be trained like this: {reason}")


@functools.cache
def freeze_libraries() -> None:
    """Have the collector leave alone what the libraries made when they were imported.

    That is some million objects, which it would look at again and again while a step is traced.
    """
    gc.collect()
    gc.freeze()


@functools.cache
def _freeze_what_came() -> None:
    """Leave alone what the first trace imported and keeps, too."""
    gc.freeze()


def _trace(
    config: RunConfig, architecture: Architecture, layers: int | None, capability: str | None
) -> Trace:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import PrinterCallback

    from lora_advisor.probes.cuda_semantics import fake_quantise, traced_config

    gradients_stay, asked = config.accumulation > 1, config
    config = traced_config(config).replace(accumulation=1)
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    recorder = Recorder(capability)
    # What holds fp32 weights for a GradScaler holds them here too.
    wide = weights_dtype(asked) == torch.float32
    dtype = torch.float32 if wide else weights_dtype(config)
    model = skeleton(config, architecture, "cpu", layers=layers, dtype=dtype)
    with _quiet(), fake_mode, _semantics(config, model, asked.precision, recorder), recorder:
        loaded = tuple(loaded_bytes(model, layer) for layer in decoder_layers(model))
        fill(model, dtype, "cpu", fake_quantise, on_gpu=True)
        vocab_size = model.config.get_text_config().vocab_size
        trainer: Any = build_trainer(
            config,
            model,
            rows=as_trained(config, [{"input_ids": [0, 0], "labels": [0, 0]}]),
            tokenizer=padding_tokenizer(vocab_size),
            # Trainer makes the folder of its output; a trace has none, and leaves none behind.
            schedule=Schedule(max_steps=2, output_dir=tempfile.gettempdir()),
            device="cpu",
            callbacks=[_phase_callback(recorder)],
        )
        trainer.remove_callback(PrinterCallback)
        if gradients_stay:
            # A later micro-batch of a step meets the gradients of those before it.
            trainer.model.zero_grad = lambda *_, **__: None
        batches = [_fake_batch(trainer, config) for _ in range(2)]
        trainer.get_train_dataloader = functools.partial(_FakeLoader, batches)
        _mark_backward(trainer, recorder)
        _mark_layers(trainer, recorder)
        with counted_hooks(recorder.note_hook):
            trainer.train()
        traced = recorder.result(trainer, loaded)
        recorder.closed = True
        return traced


def _semantics(config: RunConfig, model: Any, precision: str, recorder: Recorder) -> Any:
    from lora_advisor.probes.cuda_semantics import cuda_semantics

    return cuda_semantics(
        config,
        model,
        precision=precision,
        capability=recorder.capability,
        empty_cache=recorder.empty_cache,
    )


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
        rows = as_trained(config, random_rows(config.micro_batch, config.seq_len, 4))
        if config.packing:
            half = config.seq_len // 2
            rows = [{**row, "seq_lengths": [half, config.seq_len - half]} for row in rows]
        batch = trainer.data_collator(rows)
    made: dict[str, Any] = {}
    for key, value in batch.items():
        made[key] = torch.zeros(value.shape, dtype=value.dtype) if torch.is_tensor(value) else value
    return made


def _mark_backward(trainer: Any, recorder: Recorder) -> None:
    original: Callable[..., Any] = trainer.accelerator.backward

    def backward(*args: Any, **kwargs: Any) -> None:
        recorder.phase, recorder.layer = "backward", -1
        original(*args, **kwargs)
        # What follows is once a step too: the gradients' norm, then the optimizer.
        recorder.phase, recorder.layer = "optimizer", -1

    trainer.accelerator.backward = backward


def _mark_layers(trainer: Any, recorder: Recorder) -> None:
    """Tell the recorder which decoder layer runs; no hook here adds a node to the graph."""
    layers = decoder_layers(trainer.model)

    def enter(index: int) -> None:
        recorder.layer = index

    def before(index: int) -> Callable[..., None]:
        return lambda *_: enter(index)

    def after(index: int) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda _: enter(index))
            if index == len(layers) - 1:
                enter(-1)

        return hook

    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(before(index))
        layer.register_forward_hook(after(index))


def _phase_callback(recorder: Recorder) -> Any:
    from transformers import TrainerCallback

    class Phases(TrainerCallback):
        """Tells the recorder which part of the step runs."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            recorder.phase, recorder.layer = "forward", -1
            recorder.work.clear()

        def on_pre_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
            recorder.phase = "optimizer"
            place = _places(kwargs["model"])
            recorder.listed = {
                len(group["params"]): [place.get(id(p), -1) for p in group["params"]]
                for group in kwargs["optimizer"].param_groups
            }

        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            recorder.phase = "optimizer"

    return Phases()


@contextlib.contextmanager
def _process_as_it_was() -> Iterator[None]:
    """Put back what a Trainer sets for the whole process: the seeds and accelerate's state."""
    import random

    import numpy
    import torch
    from accelerate.state import (  # accelerate ships no types
        AcceleratorState,
        GradientState,
        PartialState,
    )

    states = [state._shared_state for state in (PartialState, AcceleratorState, GradientState)]
    kept = [dict(state) for state in states]
    python_seed, numpy_seed = random.getstate(), numpy.random.get_state()
    on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call] # torch leaves it untyped
    devices = range(torch.cuda.device_count()) if on_gpu else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python_seed)
        numpy.random.set_state(numpy_seed)
        for state, before in zip(states, kept, strict=True):
            state.clear()
            state.update(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import logging as levels
    import warnings

    import datasets
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(levels.ERROR)
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()  # of packing the rows of a trace
    # Logs the stack of what it raises, which `_refusal` says in one sentence.
    fake_tensor = levels.getLogger("torch._subclasses.fake_tensor")
    disabled, fake_tensor.disabled = fake_tensor.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        fake_tensor.disabled = disabled
        logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def _dispatch_mode() -> type:
    from torch.utils._python_dispatch import TorchDispatchMode

    return TorchDispatchMode


@functools.cache
def _device_of() -> Any:
    """Return the operation that asks a tensor of a class of its own for its device."""
    import torch

    return torch.ops.prim.device.default


class Recorder(_dispatch_mode()):  # type: ignore[misc]
    """Notes each storage when it first appears and when it dies, and the work of each operation."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let dynamo compile under this mode (`compiled_semantics`)."""
        return True

    def __init__(self, capability: str | None) -> None:
        """Start in the loading phase with nothing recorded."""
        super().__init__()
        self.capability = capability
        self.events: list[Event] = []
        self.work: dict[tuple[str, int], Work] = {}
        self.phase = "load"
        self.layer = -1
        self.closed = False
        self._known: dict[int, int] = {}  # storage's address -> block
        self._count = 0
        self._multiplied: set[tuple[str, int]] = set()  # which workspaces each thread has
        self._workspaces: list[int] = []
        #: Layers of an optimizer's parameters, by their number: foreach optimizers take lists.
        self.listed: dict[int, list[int]] = {}
        self._layer_of: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation and note what it allocates."""
        from lora_advisor.probes.cuda_semantics import answer, writes_in_place
        from lora_advisor.probes.kernel_costs import NO_KERNELS, describe

        kwargs = kwargs or {}
        if func is _device_of() and not args[0].fake_mode.in_kernel_invocation:
            return args[0].fake_device  # asked 10,000 times a trace; the long way takes a tenth
        if getattr(func, "namespace", None) in NO_KERNELS:
            return func(*args, **kwargs)
        cost = describe(func, args, kwargs, self.capability)
        result = answer(func, args, kwargs)
        if self.phase == "backward" and writes_in_place(func, args):
            result = args[0]
        if result is NotImplemented:
            temporaries = [self.allocate(size) for size in cost.temporaries]
            self._take_workspaces(cost)
            result = func(*args, **kwargs)
            self._note(result)
            for block in temporaries:
                self.release(block)
        done = self.work.setdefault((self.phase, self.layer), Work())
        work = cost.work(result)
        if work.launches:
            self.work[self.phase, self.layer] = done + self._issued(func, work)
        self._note(result)
        return result

    def _issued(self, func: Any, work: Work) -> Work:
        """Put launches down to who issues them.

        In the backward pass that is the engine, unless a checkpointed layer runs anew (its Python
        code has gradients enabled, the engine has not) or a function's own `backward` runs.
        """
        import torch

        from lora_advisor.probes.kernel_costs import issued

        node = torch._C._current_autograd_node()
        written_in_python = isinstance(node, torch.autograd.function.BackwardCFunction)
        by_engine = (
            self.phase == "backward" and not torch.is_grad_enabled() and not written_in_python
        )
        name = func.name() if hasattr(func, "name") else str(func)
        return issued(work, name, by_engine=by_engine)

    def note_hook(self) -> None:
        """Note that a hook of what is saved for the backward pass runs for a tensor."""
        done = self.work.setdefault((self.phase, self.layer), Work())
        self.work[self.phase, self.layer] = done + Work(hooks=1)

    def allocate(self, size: int) -> tuple[int, int]:
        """Note an allocation that has no tensor and return its handle."""
        self._count += 1
        self.events.append(Event(self._count, size, self.phase, self.layer))
        return self._count, size

    def release(self, block: tuple[int, int]) -> None:
        """Note the release of an allocation."""
        if not self.closed:
            self.events.append(Event(block[0], -block[1], self.phase, self.layer))

    def empty_cache(self) -> None:
        """Note that the allocator's free segments go back to the driver."""
        self.events.append(Event(0, 0, self.phase, self.layer))

    def _take_workspaces(self, cost: Cost) -> None:
        """Note the workspaces of the thread that runs this phase, where they are first needed."""
        from lora_advisor.probes.kernel_costs import FUSED_WORKSPACE, product_workspace

        if self.phase not in ("forward", "backward"):
            return
        for needed, size in (
            (cost.multiplies, product_workspace(self.capability)),
            (cost.fuses, FUSED_WORKSPACE),
        ):
            if needed and (self.phase, size) not in self._multiplied:
                self._multiplied.add((self.phase, size))
                self._workspaces.append(self.allocate(size)[0])

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
            for index, part in enumerate(result):
                self._note(part)
                if self.phase == "optimizer" and len(result) in self.listed:
                    self._place(part, self.listed[len(result)][index])

    def _place(self, tensor: Any, layer: int) -> None:
        """Note that a tensor in a list of all parameters belongs to one's decoder layer."""
        block = self._known.get(tensor.untyped_storage()._cdata)
        if block is not None and layer >= 0:
            self._layer_of[block] = layer

    def _died(self, key: int, block: tuple[int, int]) -> None:
        self._known.pop(key, None)
        self.release(block)

    def result(self, trainer: Any, loaded: tuple[int, ...]) -> Trace:
        """Return what was recorded, with the owners of the blocks that the trainer still holds.

        Args:
            trainer: After its training.
            loaded: Bytes reserved for each decoder layer before it was loaded.
        """
        owners: dict[int, str] = dict.fromkeys(self._workspaces, "workspace")
        layer_of = dict(self._layer_of)
        layers = decoder_layers(trainer.model)
        place = _places(trainer.model)

        def claim(tensor: Any, owner: str, parameter: Any = None) -> None:
            block = self._known.get(tensor.untyped_storage()._cdata)
            if block is not None:
                owners.setdefault(block, owner)
                if id(parameter) in place:
                    layer_of[block] = place[id(parameter)]

        for parameter in trainer.model.parameters():
            claim(parameter, "adapter" if parameter.requires_grad else "weights", parameter)
            for tensor in _quant_tensors(getattr(parameter, "quant_state", None)):
                claim(tensor, "weights", parameter)
        for buffer in trainer.model.buffers():
            claim(buffer, "weights")
        for parameter, state in trainer.optimizer.state.items():
            for value in state.values():
                if hasattr(value, "untyped_storage") and value.device.type != "meta":
                    claim(value, "optimizer", parameter)
        return Trace.of(
            self.events,
            owners=owners,
            layer_of=layer_of,
            work=dict(self.work),
            trainable=_trainable(trainer.model),
            layer_trainable=tuple(_trainable(layer) for layer in layers),
            layer_loaded=loaded,
        )


def _places(model: Any) -> dict[int, int]:
    """Return the decoder layer of each parameter that belongs to one, by the parameter's id."""
    layers = decoder_layers(model)
    return {id(p): index for index, layer in enumerate(layers) for p in layer.parameters()}


def _trainable(module: Any) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _quant_tensors(state: Any) -> list[torch.Tensor]:
    if state is None:
        return []
    own = [state.absmax, state.code, state.offset]
    nested = _quant_tensors(state.state2)
    return [tensor for tensor in own if tensor is not None] + nested
