"""CUDA's autocast in place of the CPU's while a step is traced.

The two devices cast different operations: CUDA runs a layer norm or a softmax in fp32, the CPU does
not. Source: aten/src/ATen/autocast_mode.h of PyTorch 2.11 to 2.13, the lists AT_FORALL_FP32,
AT_FORALL_FP32_SET_OPT_DTYPE and the policy of `norm` (AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

#: Floating-point arguments of these become fp32 (AT_FORALL_FP32; losses, which the CPU casts too,
#: and operations no language model has are left out).
_FP32 = (
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal",
    "rsqrt", "sinh", "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus",
    "layer_norm", "native_layer_norm", "group_norm", "cosine_similarity", "logsumexp",
)  # fmt: skip
#: Their `dtype` becomes fp32 where a half-precision argument came without one
#: (AT_FORALL_FP32_SET_OPT_DTYPE).
_FP32_RESULT = (
    "prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum",
    "linalg_vector_norm", "sum", "sum.dim_IntList",
)  # fmt: skip


@contextlib.contextmanager
def cuda_autocast() -> Iterator[None]:
    """Cast what CUDA casts; and let questions that name no device mean CUDA, as peft asks them."""
    import torch

    is_enabled = torch.is_autocast_enabled
    untyped: Any = torch.library  # torch leaves its methods untyped
    library = untyped.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is replaced is what is wanted
        for name in _FP32:
            library.impl(name, _in_fp32(_operation(name)), "AutocastCPU")
        for name in _FP32_RESULT:
            library.impl(name, _to_fp32(_operation(name)), "AutocastCPU")
    try:
        with (
            mock.patch.object(
                torch, "is_autocast_enabled", lambda device="cpu": bool(is_enabled(device))
            ),
            mock.patch.object(
                torch, "get_autocast_gpu_dtype", lambda: torch.get_autocast_dtype("cpu")
            ),
        ):
            yield
    finally:
        library._destroy()


def _operation(name: str) -> Any:
    import torch

    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _below_autocast() -> Any:
    import torch

    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    return torch._C._ExcludeDispatchKeyGuard(keys)


def _in_fp32(operation: Any) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with _below_autocast():
            return operation(
                *(_widened(value) for value in args),
                **{key: _widened(value) for key, value in kwargs.items()},
            )

    return run


def _to_fp32(operation: Any) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        import torch

        with _below_autocast():
            given = kwargs.get("dtype") or next(
                (value for value in args if isinstance(value, torch.dtype)), None
            )
            if given is None and _is_half(args[0]):
                kwargs["dtype"] = torch.float32
            return operation(*args, **kwargs)

    return run


def _is_half(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)


def _widened(value: Any) -> Any:
    """Return a half-precision tensor as fp32 (autocast_mode.h, cached_cast), the rest as it is."""
    return value.float() if _is_half(value) else value
