"""Compiled layers as a trace sees them (first draft)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

@torch.library.custom_op("lora_advisor::fused_kernel", mutates_args=())
def _fused_kernel(arguments: list[torch.Tensor]) -> None:
    raise NotImplementedError


@_fused_kernel.register_fake
def _(arguments: list[torch.Tensor]) -> None:
    return None

def _fused(*arguments: Any) -> None:
    torch.ops.lora_advisor.fused_kernel([a for a in arguments if isinstance(a, torch.Tensor)])


def _reinterpret(tensor: torch.Tensor, size: Any, stride: Any, offset: int = 0) -> torch.Tensor:
    return torch.as_strided(tensor, size, stride, tensor.storage_offset() + offset)

KEEP = []
def _module(graph: Any) -> Any:
    code, _ = graph.codegen()
    KEEP.append(code.value)
    names: dict[str, Any] = {}
    source = code.value.replace("torch.ops.higher_order.", "higher_order.")
    exec(compile(source, "<inductor>", "exec"), names)
    names.update(
        empty_strided_cpu=lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype),
        reinterpret_tensor=_reinterpret,
        assert_size_stride=lambda *_: None,
        assert_alignment=lambda *_: None,
        fused=_fused,
        higher_order=SimpleNamespace(run_and_save_rng_state=lambda op, *a, **k: (torch.empty(0), op(*a, **k)), run_with_rng_state=lambda state, op, *a, **k: op(*a, **k)),
    )
    return SimpleNamespace(call=names["call"], runner=None, __file__="<inductor>")


def _call_kernel(kernel: Any, name: str, node: Any = None, deallocate_ws: bool = True) -> None:
    from torch._inductor.virtualized import V

    _, arguments, _, _ = kernel.args.python_argdefs()
    V.graph.wrapper_code.writeline(f"fused({', '.join(str(a) for a in arguments)})")


def _inner_compile(*args: Any, **kwargs: Any) -> Any:
    from torch._inductor.compile_fx import compile_fx_inner
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        return compile_fx_inner(*args, **kwargs)


def _backend(graph: Any, inputs: Sequence[Any], **options: Any) -> Any:
    from torch._inductor.compile_fx import compile_fx
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        return compile_fx(graph, inputs, inner_compile=_inner_compile)


@contextlib.contextmanager
def compiled() -> Iterator[None]:
    from torch._inductor import config, ir
    from torch._inductor.codegen.triton import TritonKernel, TritonScheduling
    from torch._inductor.graph import GraphLowering

    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(config.patch(cpu_backend="triton", force_pointwise_cat=True, force_disable_caches=True))
        enter(mock.patch.object(torch.nn.Module, "compile", compile_module))
        enter(mock.patch.object(GraphLowering, "compile_to_module", _module))
        enter(mock.patch.object(ir, "is_cpu", lambda x: False))
        enter(mock.patch.object(TritonKernel, "codegen_kernel", lambda self, name=None: ""))
        enter(mock.patch.object(TritonKernel, "call_kernel", _call_kernel))
        enter(mock.patch.object(TritonScheduling, "define_kernel", lambda *_: "fused"))
        from lora_advisor.probes import liger_semantics
        enter(mock.patch.object(liger_semantics, "_call", torch._dynamo.disable(liger_semantics._call)))
        yield


def compile_module(module: torch.nn.Module, **_: Any) -> None:
    forward = type(module).forward.__get__(module)
    module.forward = torch.compile(forward, backend=_backend, dynamic=False)
