"""Libraries as they run on CUDA, put in place of what they do on the CPU of a trace's fake tensors.

Each entry names the source of the rule. Versions: PyTorch 2.13, bitsandbytes 0.50.2, TRL 1.16.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from unittest import mock

from lora_advisor.probes.attention_semantics import generation
from lora_advisor.probes.stand_ins import triton_kernel

if TYPE_CHECKING:
    import torch


def liger_patches(model: Any) -> list[Any]:
    """Liger's kernels as stand-ins, whether or not the package is here."""
    from transformers import trainer

    from lora_advisor.probes import liger_semantics

    patches: list[Any] = [
        mock.patch.object(trainer, "apply_liger_kernel", liger_semantics.apply_liger),
    ]
    module = liger_semantics.rope_module(model)
    if module is not None:
        patches.append(mock.patch.object(module, "apply_rotary_pos_emb", liger_semantics.rotary))
    return patches


def trl_patches() -> list[Any]:
    """TRL's fused loss, and the one-pass loss, as Triton's kernels run them: tiles in place."""
    import torch
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    from lora_advisor.probes import one_pass_head

    def fold(tile: torch.Tensor, *_: Any, **__: Any) -> None:
        triton_kernel(tile)

    def unfold(tile: torch.Tensor, *_: Any, **__: Any) -> None:
        triton_kernel(tile, tile)  # the logits become their gradient

    def fold_once(tile: torch.Tensor, *_: Any, **__: Any) -> None:
        triton_kernel(tile, tile, tile)  # read for the maximum, then for what becomes of it

    def addmm_fp32(acc: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        torch.addmm(acc, a, b, out_dtype=torch.float32, out=acc)

    return [
        mock.patch.object(utils, "_use_triton", lambda device: True),
        mock.patch.object(chunked_logprob, "_forward_tile", fold),
        mock.patch.object(chunked_logprob, "_backward_tile", unfold),
        mock.patch.object(chunked_logprob, "_addmm_fp32", addmm_fp32),
        mock.patch.object(one_pass_head, "fold_tile", fold_once),
    ]


def optimizer_patches() -> list[Any]:
    """Optimizers as they run on CUDA.

    Unless told otherwise torch's take all parameters of a list at once there (foreach:
    torch/optim/optimizer.py, `_default_to_fused_or_foreach`); bitsandbytes' update in place, and
    hold the paged states of tensors from 1e5 elements on outside the allocator (managed memory:
    bitsandbytes/optim/optimizer.py, `get_state_buffer`).
    """
    import torch
    from bitsandbytes.optim import optimizer as bnb

    def state_buffer(
        self: Any, p: torch.Tensor, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        paged = self.is_paged and p.numel() >= 1e5
        return torch.zeros_like(p, dtype=dtype, device="meta" if paged else p.device)

    def update_step(self: Any, group: Any, p: torch.Tensor, gindex: int, pindex: int) -> None:
        # The kernels read a contiguous gradient and write the parameter and its states in place.
        p.data = p.data.contiguous()
        p.grad = p.grad.contiguous()  # type: ignore[union-attr]
        # One launch, through bitsandbytes' Python code, for each parameter: no list takes them all.
        states = [s for s in self.state[p].values() if isinstance(s, torch.Tensor)]
        triton_kernel(p.data, p.grad, p.data, *states, *states)

    patches = [
        mock.patch.object(bnb.Optimizer8bit, "get_state_buffer", state_buffer),
        mock.patch.object(bnb.Optimizer8bit, "prefetch_state", lambda self, p: None),
        mock.patch.object(bnb.Optimizer2State, "update_step", update_step),
        mock.patch.object(bnb.Optimizer1State, "update_step", update_step),
        mock.patch.object(bnb, "sync_gpu", lambda tensor: None),
    ]
    for name in ("adam", "adamw", "sgd", "rmsprop", "adagrad"):
        module = importlib.import_module(f"torch.optim.{name}")
        if hasattr(module, "_default_to_fused_or_foreach"):
            patches.append(
                mock.patch.object(
                    module, "_default_to_fused_or_foreach", lambda *_, **__: (False, True)
                )
            )
    return patches


def grouped_product_patches(capability: str | None) -> list[Any]:
    """Experts without the grouped product, which needs compute capability 8.0 on CUDA.

    Source: transformers/integrations/moe.py, `_can_use_grouped_mm`.
    """
    if generation(capability) >= (8, 0):
        return []
    try:
        from transformers.integrations import moe
    except ImportError:
        return []
    if not hasattr(moe, "_can_use_grouped_mm"):
        return []
    return [mock.patch.object(moe, "_can_use_grouped_mm", lambda *_, **__: False)]


def save_on_host(pin_memory: bool = False, device_type: str = "cuda") -> Any:
    """Offloaded checkpoints: what is saved leaves the device and comes back when asked for."""
    import torch

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to("meta")

    def unpack(held: torch.Tensor) -> torch.Tensor:
        return torch.empty(held.shape, dtype=held.dtype, device="cpu")

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    """Dropout that keeps one byte an element, as CUDA's fused kernel does (native_dropout)."""
    import torch

    if p == 0 or not training:
        return input
    return torch.native_dropout(input, p, training)[0]


def softmax_for(precision: str) -> Callable[..., Any]:
    """Softmax that widens fp16 as it reads (native/cuda/SoftMax.cu, `host_softmax`).

    The CPU, and CUDA for bf16, make a copy in fp32 first.
    """
    import torch

    softmax = torch.nn.functional.softmax

    def run(
        input: torch.Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None
    ) -> Any:
        half = input.dtype in (torch.float16, torch.bfloat16)
        if precision == "fp16" and half and dtype is torch.float32 and dim is not None:
            return _half_softmax(input, dim)
        return softmax(input, dim=dim, _stacklevel=_stacklevel, dtype=dtype)

    return run


def _half_softmax(input: torch.Tensor, dim: int) -> Any:
    """Softmax of half-precision numbers in fp32, without a copy of them in fp32."""
    import torch

    class HalfSoftmax(torch.autograd.Function):
        """aten::_softmax with half_to_float, which the CPU has for no type."""

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            out = torch.empty(x.shape, dtype=torch.float32)
            ctx.save_for_backward(out)
            ctx.kind = x.dtype
            return out

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            (out,) = ctx.saved_tensors
            product = grads[0] * out
            result = torch.empty(product.shape, dtype=ctx.kind)
            del product
            return result

    apply: Any = HalfSoftmax.apply
    return apply(input)
