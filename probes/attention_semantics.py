"""Which attention kernel CUDA takes, and what its backward pass needs for itself.

Fake tensors stand on the CPU, whose one fused kernel saves what CUDA's save: the output and one
fp32 number a query. What differs is which calls find no fused kernel at all, and the workspaces.
Source: aten/src/ATen/native/transformers/cuda/{sdp_utils.cpp, attention_backward.cu,
flash_attn/flash_api.cpp, mem_eff_attention/kernel_backward.h} of PyTorch 2.11 to 2.13; cuDNN's
workspace was read off allocations recorded on an H100 (tests/recordings).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    import torch

#: Where a card's capability is not known, the kernels of current cards are assumed.
_CURRENT = (8, 9)


def generation(capability: str | None) -> tuple[int, int]:
    """Return a compute capability such as "8.9" as two numbers."""
    if capability is None:
        return _CURRENT
    major, _, minor = capability.partition(".")
    return int(major), int(minor or 0)


def why_no_bounds(capability: str | None, precision: str) -> str | None:
    """Return why no kernel takes the bounds of packed rows; None where one does.

    flash_attn/flash_api.cpp, `mha_varlen_fwd`.

    Args:
        capability: Of the card.
        precision: The one that is multiplied in.
    """
    if precision == "fp32":
        return "the kernel has no fp32 form"
    if generation(capability) < (8, 0):
        return "the kernel needs compute capability 8.0"
    return None


def kernel_of(
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    dtype: torch.dtype,
    *,
    masked: bool,
    capability: str | None,
) -> str:
    """Return "cudnn", "flash", "efficient" or "math" (sdp_utils.cpp, `select_sdp_backend`).

    cuDNN comes first on 9.0 and 10.0 only (`check_prefer_cudnn_attention`). The memory-efficient
    kernel takes masks and fp32 but no grouped heads.

    Args:
        shapes: Of queries and keys: (batch, heads, length, width).
        dtype: The one they are multiplied in.
        masked: Whether a mask is given.
        capability: Of the card.
    """
    import torch

    (_, heads, _, width), (_, kv_heads, _, _) = shapes
    card = generation(capability)
    half = dtype in (torch.float16, torch.bfloat16)
    if half and card in ((9, 0), (10, 0)) and width <= 256:
        return "cudnn"
    if half and card >= (8, 0) and not masked and width <= 256:
        return "flash"
    if heads == kv_heads and (dtype != torch.bfloat16 or card >= (8, 0)):
        return "efficient"
    return "math"


def backward_workspace(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], kernel: str
) -> tuple[int, ...]:
    """Return the bytes of each block that a kernel's backward pass holds while it runs.

    cuDNN takes one block: the queries' gradient in fp32, one fp32 number a query, and, where heads
    are grouped, keys' and values' gradients for every query head. FlashAttention takes the same in
    blocks of their own, lengths rounded to 128 and widths to 32, above 128 to 64. The
    memory-efficient kernel takes one fp32 number a query and sums the gradients in fp32, those of
    keys and values only where a head is too wide for registers (`kOutputInRF`).
    """
    (batch, heads, length, width), (_, kv_heads, kv_length, _) = shapes
    grouped = heads != kv_heads
    if kernel == "cudnn":
        queries = batch * heads * length * (4 * width + 4)
        return (queries + (batch * heads * kv_length * width * 4 if grouped else 0) + 512,)
    if kernel == "flash":
        rounded = -(-length // 128) * 128
        step = 32 if width <= 128 else 64
        wide = -(-width // step) * step
        own = (batch * heads * rounded * 4, batch * heads * rounded * wide * 4)
        return own + (batch * heads * kv_length * width * 2,) * (2 if grouped else 0)
    sums = 3 if width > 64 else 1
    return (batch * heads * length * 4, batch * heads * length * width * 4 * sums)


def attention_patch(capability: str | None, precision: str) -> Any:
    """Send the calls that find no fused kernel on the card to the unfused one.

    Args:
        capability: Of the card.
        precision: What the step stands for: "fp16" is traced in bf16, which older cards lack.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fused: Any = torch.nn.functional.scaled_dot_product_attention

    @functools.wraps(fused)
    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        # Autocast casts before the kernel is chosen.
        casts = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if casts else query.dtype
        if precision == "fp16" and dtype == torch.bfloat16:
            dtype = torch.float16
        kernel = kernel_of(
            (tuple(query.shape), tuple(key.shape)),
            dtype,
            masked=attn_mask is not None,
            capability=capability,
        )
        if kernel != "math":
            return fused(query, key, value, attn_mask, *args, **kwargs)
        with sdpa_kernel(SDPBackend.MATH):
            return fused(query, key, value, attn_mask, *args, **kwargs)

    return mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attend)
