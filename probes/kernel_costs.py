"""What one operation costs on CUDA beyond its outputs: blocks it holds while it runs, and its work.

Versions: PyTorch 2.11 to 2.13, bitsandbytes 0.50.2.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lora_advisor.probes.adapter_products import INPUT_GRADIENT, PRODUCT
from lora_advisor.probes.attention_semantics import backward_workspace, generation, kernel_of
from lora_advisor.probes.events import Work
from lora_advisor.probes.stand_ins import TRITON, in_compiled_program

MIB = 2**20


@dataclass(frozen=True)
class Cost:
    """What one operation needs beyond its outputs.

    Attributes:
        temporaries: Bytes of each block that lives only while the operation runs.
        multiplies: Whether it calls cuBLAS.
        fuses: Whether it calls cuBLASLt, which adds a bias to a product.
        work: Given the result, the work of the operation.
    """

    temporaries: tuple[int, ...]
    multiplies: bool
    fuses: bool
    work: Callable[[Any], Work]


def describe(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], capability: str | None
) -> Cost:
    """Return what an operation needs on a card of this capability."""
    name = func.name() if hasattr(func, "name") else str(func)
    temporaries: tuple[int, ...] = ()
    if "gemm_4bit" in name:
        temporaries = _gemm_4bit_temporaries(args, kwargs)
    elif "scaled_dot_product" in name and "backward" in name:
        temporaries = _attention_temporaries(args, kwargs, capability)
    elif name.startswith("aten::_flash_attention_backward"):
        temporaries = _varlen_temporaries(args)
    elif name.startswith("aten::_softmax_backward_data"):
        # aten/src/ATen/native/cuda/SoftMax.cu, softmax_backward_cuda_out: tmp = grad * output
        temporaries = (args[0].numel() * args[0].element_size(),)
    multiplies = bool(temporaries) if "gemm_4bit" in name else _multiplies(name)
    if "gemm_4bit" in name:
        bias = kwargs.get("bias", args[6] if len(args) > 6 else None)
        fuses = multiplies and bias is not None
    else:
        fuses = name.startswith("aten::addmm") and args[0].dim() == 1
    return Cost(
        temporaries, multiplies, fuses, lambda result: _work(name, args, kwargs, result, capability)
    )


#: What cuBLASLt takes for each thread (aten/src/ATen/cuda/CUDABlas.cpp, _getWorkspaceSize).
FUSED_WORKSPACE = MIB


def product_workspace(capability: str | None) -> int:
    """Return the bytes that cuBLAS takes for each thread that multiplies.

    aten/src/ATen/cuda/CUDABlas.cpp, parseChosenWorkspaceSize: 4096 KiB x 8 on Hopper and data
    centre Blackwell, 4096 KiB x 2 + 16 KiB x 8 elsewhere.
    """
    large = generation(capability)[0] in (9, 10)
    return 8 * 4 * MIB if large else 2 * 4 * MIB + 8 * 16 * 1024


#: Up to this many rows bitsandbytes multiplies with packed weights (backends/cuda/ops.py,
#: `_gemm_4bit_use_custom_cuda`: its largest bound for weights of 4 Mi values or more).
PACKED_ROWS = 320


def _gemm_4bit_temporaries(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    """Scales and weight dequantised for F.linear (backends/cuda/ops.py, _dequant_linear_fallback).

    The scales of double quantisation take two blocks: read back, and with their offset added.
    """
    a, _, shape = args[:3]
    if a.numel() // a.shape[-1] <= PACKED_ROWS:
        return ()
    nested = kwargs.get("absmax_8bit", args[7] if len(args) > 7 else None)
    scales = () if nested is None else (nested.numel() * 4,) * 2
    return (*scales, math.prod(shape) * a.element_size())


def _attention_temporaries(
    args: tuple[Any, ...], kwargs: dict[str, Any], capability: str | None
) -> tuple[int, ...]:
    query, key = args[1], args[2]
    shapes = (tuple(query.shape), tuple(key.shape))
    masked = kwargs.get("attn_mask") is not None
    kernel = kernel_of(shapes, query.dtype, masked=masked, capability=capability)
    return backward_workspace(shapes, kernel)


def _varlen_temporaries(args: tuple[Any, ...]) -> tuple[int, ...]:
    """Workspaces of the kernel for rows of several lengths (flash_api.cpp, `mha_varlen_bwd`).

    Those of the kernel for rows of one length, but for tokens end to end and 128 more a document.
    """
    (tokens, heads, width), (_, kv_heads, _) = args[1].shape, args[2].shape
    padded = tokens + 128 * (args[6].numel() - 1)
    shapes = ((1, heads, padded, width), (1, kv_heads, tokens, width))
    return backward_workspace(shapes, "flash")


#: Namespaces of questions and notes that a dispatch mode sees beside the operations.
NO_KERNELS = ("prim", "profiler")
_VIEWS = (
    "new_empty",
    "view", "transpose", "expand", "slice", "select", "unsqueeze", "squeeze", "permute",
    "detach", "alias", "as_strided", "split", "unbind", "_unsafe_view", "lift", "empty", "size",
)  # fmt: skip
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear")


def _multiplies(name: str) -> bool:
    return name in _ADAPTED or name.split("::")[1].split(".")[0] in _PRODUCTS


#: Products with an adapter's share, which compiled layers call.
_ADAPTED = (PRODUCT, INPUT_GRADIENT)
#: Operations whose Python code costs more than the kernels that it launches: they count as one.
_CUSTOM = (TRITON, "bitsandbytes::", *_ADAPTED)


def issued(work: Work, name: str, *, by_engine: bool) -> Work:
    """Return the work with its launches put down to who issues them."""
    launches = work.launches
    if not launches:
        return work
    if in_compiled_program() and name.startswith(("bitsandbytes::", *_ADAPTED)):
        return dataclasses.replace(work, launches=0.0, compiled_custom_launches=1.0)
    if name.startswith(_CUSTOM):
        return dataclasses.replace(work, launches=0.0, custom_launches=1.0)
    if in_compiled_program():
        return dataclasses.replace(work, launches=0.0, compiled_launches=launches)
    if by_engine:
        return dataclasses.replace(work, launches=0.0, engine_launches=launches)
    return work


def _work(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, capability: str | None
) -> Work:
    """Count one operation's floating-point operations, or the bytes it moves."""
    short = name.split("::")[1]
    if short == "t" or short.startswith(_VIEWS):
        return Work()
    if short.startswith(_PRODUCTS):
        return _product_work(short, args, result)
    if name in _ADAPTED:
        return _adapted_work(args, result)
    if "gemm_4bit" in short:
        rows = args[0].numel() // args[0].shape[-1]
        weight = math.prod(args[2])
        # Reads half a byte, writes and reads back the dequantised value.
        moved = weight * (0.5 + 2 * args[0].element_size())
        return Work(launches=4, matmul_flops=2.0 * rows * weight, bytes_moved=moved)
    if "dequantize_4bit" in short:
        return Work(launches=1, bytes_moved=_bytes(args) + _bytes(result))
    if "scaled_dot_product" in short:
        return _attention_work(short, args, kwargs, capability)
    if short.startswith("_flash_attention"):
        return _varlen_work("backward" in short, args)
    return Work(launches=1, bytes_moved=_bytes(args) + _bytes(result))


#: Floating-point operations for each byte below which a product waits for memory: cards have 76
#: (RTX 3090) to 300 (H100); an adapter of rank 16 has 16, a layer's own products hundreds.
_THIN = 100


def _product_work(short: str, args: tuple[Any, ...], result: Any) -> Work:
    tensors = [arg for arg in args if hasattr(arg, "shape") and arg.dim() >= 2]
    if short.startswith(("addmm", "baddbmm")):
        tensors = tensors[-2:]
    left, right = tensors[0], tensors[1]
    flops = 2.0 * left.numel() * right.shape[-1]
    # What is added is read while tiles are multiplied: it makes no product a thin one.
    if flops < _THIN * (_bytes(left) + _bytes(right) + _bytes(result)):
        return Work(launches=1, bytes_moved=_bytes(args) + _bytes(result))
    # The factors decide, not the sum: tensor cores add products of 16 bits up in 32.
    if left.element_size() > 2:
        return Work(launches=1, fp32_matmul_flops=flops)
    return Work(launches=1, matmul_flops=flops)


def _adapted_work(args: tuple[Any, ...], result: Any) -> Work:
    """Two products: the adapter's share, then what is frozen, added to it (adapter_products.py)."""
    if len(args) == 4:
        outer, into, factor_a, weight = args
        thin, wide = (into, factor_a), (outer, weight)
    else:
        rows, inner, _, factor_b, weight = args
        thin, wide = (inner, factor_b.t()), (rows, weight.t())
    return _product_work("mm", thin, result) + _product_work("mm", wide, result)


def _attention_work(
    short: str, args: tuple[Any, ...], kwargs: dict[str, Any], capability: str | None
) -> Work:
    """Four products forward (two, causal half) and five backward; FlashAttention-2, section 3.2."""
    backward = "backward" in short
    query, key = (args[1], args[2]) if backward else (args[0], args[1])
    batch, heads, length, width = query.shape
    product = 2.0 * batch * heads * length * key.shape[2] * width / 2  # causal: half the scores
    flops = product * (5 if backward else 2)
    masked = kwargs.get("attn_mask") is not None
    shapes = (tuple(query.shape), tuple(key.shape))
    kernel = kernel_of(shapes, query.dtype, masked=masked, capability=capability)
    term = "attention_flops" if kernel in ("flash", "cudnn") else "efficient_attention_flops"
    if query.element_size() > 2:
        term = "fp32_attention_flops"
    return Work(launches=4 if backward else 1, **{term: flops})


def _varlen_work(backward: bool, args: tuple[Any, ...]) -> Work:
    """Products as in `_attention_work`, of documents half as long as the longest may be.

    How long they are is a matter of values; a probe's rows hold two documents each.
    """
    query, longest = (args[1], args[8]) if backward else (args[0], args[5])
    tokens, heads, width = query.shape
    product = 2.0 * heads * tokens * (longest / 2) * width / 2
    return Work(launches=4 if backward else 1, attention_flops=product * (5 if backward else 2))


def _bytes(value: Any) -> float:
    if hasattr(value, "element_size"):
        return float(value.numel() * value.element_size())
    if isinstance(value, list | tuple):
        return sum(_bytes(part) for part in value)
    return 0.0
