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

import functools
import gc
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lora_advisor.probes import libraries
from lora_advisor.probes.architectures import Architecture
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.dataset import random_rows
from lora_advisor.probes.errors import AdvisorError, UntraceableError, UsageError
from lora_advisor.probes.events import Trace
from lora_advisor.probes.finetune import (
    Schedule,
    build_trainer,
    decoder_layers,
    padding_tokenizer,
)
from lora_advisor.probes.host_embedding import telling
from lora_advisor.probes.preference import as_trained
from lora_advisor.probes.quiet import process_as_it_was, quiet
from lora_advisor.probes.recorder import Recorder, places_of
from lora_advisor.probes.saved_hooks import counted_hooks
from lora_advisor.probes.weights import fill, loaded_bytes, skeleton, weights_dtype


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
    libraries.freeze()
    try:
        with process_as_it_was():
            return _trace(config, architecture, layers, capability)
    except AdvisorError:
        raise
    except Exception as error:  # what the libraries raise is theirs to choose
        if os.environ.get("LORA_ADVISOR_DEBUG"):
            raise
        raise _refusal(architecture.name, error) from error
    finally:
        gc.collect()
        libraries.freeze_what_came()


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
    recorder = Recorder(capability, as_graph=config.cuda_graph != "off")
    # What holds fp32 weights for a GradScaler holds them here too.
    wide = weights_dtype(asked) == torch.float32
    dtype = torch.float32 if wide else weights_dtype(config)
    model = skeleton(config, architecture, "cpu", layers=layers, dtype=dtype)
    with quiet(), fake_mode, _semantics(config, model, asked.precision, recorder), recorder:
        loaded = tuple(loaded_bytes(model, layer) for layer in decoder_layers(model))
        fill(model, dtype, "cpu", fake_quantise, on_gpu=True)
        vocab_size = model.config.get_text_config().vocab_size
        with telling(recorder.leaves_device):
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
            place = places_of(kwargs["model"])
            recorder.listed = {
                len(group["params"]): [place.get(id(p), -1) for p in group["params"]]
                for group in kwargs["optimizer"].param_groups
            }

        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            recorder.phase = "optimizer"

    return Phases()
