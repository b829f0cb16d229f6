"""Compiled decoder layers as a trace sees them: what Inductor's code for CUDA allocates.

The layers are compiled by the installed PyTorch itself: dynamo cuts the layer into graphs,
AOTAutograd's partitioner chooses what is saved for the backward pass, Inductor fuses, plans reuse
and writes the program that allocates each buffer, calls each kernel and drops each buffer after its
last use. That program runs here on fake tensors, with kernels that do nothing in place of Triton's.
So neither a GPU nor Triton is needed, and what another version of PyTorch does differently, a trace
with that version does too. (Up to 2.11 at least, the partitioner saves what an `autograd.Function`
computes inside a checkpointed layer, so QLoRA keeps the output of every quantised product; 2.13
recomputes it.) Checked against runs and Inductor's code of torch 2.11 on an H100.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from lora_advisor.probes.stand_ins import compiled_program, fused_kernel


@contextlib.contextmanager
def compiled_layers() -> Iterator[None]:
    """Let `Module.compile` compile for a trace, until this ends.

    A module's hooks stay outside of what is compiled, so a trace may add its own to it.
    """
    import torch._dynamo
    from torch._inductor import config, ir
    from torch._inductor.codegen.triton import TritonKernel, TritonScheduling
    from torch._inductor.graph import GraphLowering

    from lora_advisor.probes import liger_semantics

    patches: list[Any] = [
        # Triton's scheduling, which CUDA has, for the CPU of the fake tensors. The caches are off
        # because what is compiled here is of use to nobody else, and the other way round.
        config.patch(
            cpu_backend="triton",
            force_pointwise_cat=True,  # as on CUDA: lowering.cat fuses nothing on a CPU
            force_disable_caches=True,
            compile_threads=1,
        ),
        # On a CPU alone, exp and sigmoid used twice become buffers (StorageBox.
        # should_realize_on_reuse); nothing else in `ir` asks.
        mock.patch.object(ir, "is_cpu", lambda _: False),
        mock.patch.object(GraphLowering, "compile_to_module", _compile_to_module),
        mock.patch.object(TritonKernel, "codegen_kernel", lambda *_: ""),
        mock.patch.object(TritonKernel, "call_kernel", _call_kernel),
        mock.patch.object(TritonScheduling, "define_kernel", lambda *_: "fused"),
        mock.patch.object(torch.nn.Module, "compile", _compile),
        # liger_kernel/backends/dispatch.py turns dynamo off for the rotary embedding: the graph
        # breaks there and, under activation checkpointing, the layer runs uncompiled. Its norms
        # and gated MLPs are kernels inside the graphs, and keep the same tensors when outside.
        mock.patch.object(liger_semantics, "_call", _uncompiled(liger_semantics._call)),
    ]
    # Code of other models counts towards dynamo's limit of recompilations, before and after.
    torch._dynamo.reset()
    with contextlib.ExitStack() as stack:
        stack.callback(torch._dynamo.reset)
        for patch in patches:
            stack.enter_context(patch)
        yield


def _uncompiled(function: Any) -> Any:
    disable: Any = torch._dynamo.disable
    return disable(function)


def _compile(module: torch.nn.Module, **_: Any) -> None:
    """Stand for `Module.compile`."""
    forward: Any = type(module).forward.__get__(module)
    module.forward = torch.compile(forward, backend=_backend, dynamic=False)


def _backend(graph: Any, inputs: Sequence[Any]) -> Any:
    """Compile a graph of dynamo's; what the compiler itself computes is not the step's."""
    from torch._inductor.compile_fx import compile_fx
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        return compile_fx(graph, inputs, inner_compile=_inner_compile)


def _inner_compile(*args: Any, **kwargs: Any) -> Any:
    """Compile one pass; AOTAutograd compiles the backward pass only when it is first run."""
    from torch._inductor.compile_fx import compile_fx_inner
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        return compile_fx_inner(*args, **kwargs)


def _compile_to_module(graph: Any) -> Any:
    """Make Inductor's program callable, with the dispatcher's functions for its shortcuts.

    The program takes its buffers from functions that go past the dispatcher, and so past fake
    tensors and dispatch modes (torch/csrc/dynamo/guards.cpp).
    """
    code, _ = graph.codegen()
    source = code.value.replace("torch.ops.higher_order.", "higher_order.")
    names: dict[str, Any] = {}
    exec(compile(source, "<inductor>", "exec"), names)
    names.update(
        fused=fused_kernel,
        empty_strided_cpu=_empty_strided,
        reinterpret_tensor=_reinterpret,
        assert_size_stride=_no_check,
        assert_alignment=_no_check,
        higher_order=SimpleNamespace(
            run_and_save_rng_state=_run_and_save_state, run_with_rng_state=_run_with_state
        ),
    )

    def call(*args: Any) -> Any:
        with compiled_program():
            return names["call"](*args)

    return SimpleNamespace(call=call, runner=None, __file__="<inductor>")


def _call_kernel(kernel: Any, *_: Any, **__: Any) -> None:
    """Write the call of a fused kernel into the program."""
    from torch._inductor.virtualized import V

    _, arguments, _, _ = kernel.args.python_argdefs()
    program: Any = V.graph.wrapper_code
    program.writeline(f"fused({', '.join(map(str, arguments))})")


def _empty_strided(size: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=dtype)


def _reinterpret(tensor: torch.Tensor, size: Any, stride: Any, offset: int) -> torch.Tensor:
    return torch.as_strided(tensor, size, stride, tensor.storage_offset() + offset)


def _no_check(*_: Any) -> None:
    """Check nothing: the sizes are those the program was written for."""


def _run_and_save_state(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation that may draw random numbers; a CUDA generator's state is on the host."""
    return torch.empty(0), operation(*args, **kwargs)


def _run_with_state(_: Any, operation: Any, *args: Any, **kwargs: Any) -> Any:
    return operation(*args, **kwargs)
