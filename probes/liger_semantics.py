"""Liger's kernels as a trace sees them: what each saves, allocates and overwrites.

Liger's Triton kernels need a GPU, and the trace needs none, so each stands here as an autograd
function with the same storages. Source: liger-kernel 0.8.5, liger_kernel/ops/{rms_norm, swiglu,
rope, fused_linear_cross_entropy}.py. As Liger does, the stand-ins reach norms, gated MLPs, rotary
embeddings and, where asked, the loss.
"""

from __future__ import annotations

import sys
from types import MethodType
from typing import Any

import torch

from lora_advisor.probes.stand_ins import triton_kernel


class _RmsNorm(torch.autograd.Function):
    """Saves the input and one fp32 number a row; the gradient overwrites the incoming one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(flat, weight, torch.empty(flat.shape[0], dtype=torch.float32))
        normed = torch.empty_like(flat)
        triton_kernel(flat, normed)
        return normed.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        flat, weight, _ = ctx.saved_tensors
        partial = torch.empty((132, flat.shape[-1]), dtype=torch.float32)  # one row an SM
        triton_kernel(flat, grads[0], grads[0], partial)
        needed = partial.sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return grads[0], needed


class _SiluMul(torch.autograd.Function):
    """Saves both inputs; their gradients overwrite them."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a, b = a.contiguous(), b.contiguous()
        ctx.save_for_backward(a, b)
        product = torch.empty_like(a)
        triton_kernel(a, b, product)
        return product

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        inputs = ctx.saved_tensors
        triton_kernel(*inputs, *grads, *inputs)
        return inputs


class _Rope(torch.autograd.Function):
    """Rotates queries and keys in place."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, *_: torch.Tensor) -> Any:
        triton_kernel(q, k, q, k)
        return q.view_as(q), k.view_as(k)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        triton_kernel(*grads, *grads)
        return grads[0], grads[1], None, None


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes loss and gradient of the head in chunks of tokens, both in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        tokens, width = hidden.shape
        factor = -(-weight.shape[0] // width)
        chunk = min(1 << (-(-tokens // factor) - 1).bit_length(), tokens)
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        loss = torch.zeros(tokens, dtype=torch.float32)
        for start in range(0, tokens, chunk):
            logits = hidden[start : start + chunk] @ weight.t()
            triton_kernel(logits, logits)  # the loss and, in place, its gradient
            grad_hidden[start : start + chunk] = logits @ weight
            if grad_weight is not None:
                grad_weight += logits.t() @ hidden[start : start + chunk]
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss.sum()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return ctx.saved_tensors


def apply_liger(model: Any, options: dict[str, bool] | None) -> None:
    """Put the stand-ins where `apply_liger_kernel` puts Liger's kernels."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for module in base.modules():
        if "RMSNorm" in type(module).__name__ and getattr(module, "weight", None) is not None:
            module.forward = MethodType(_norm_forward, module)
        elif hasattr(module, "down_proj") and hasattr(module, "gate_proj"):
            module.forward = MethodType(_mlp_forward, module)
        elif hasattr(module, "down_proj") and hasattr(module, "gate_up_proj"):
            module.forward = MethodType(_fused_mlp_forward, module)
    if (options or {}).get("fused_linear_cross_entropy"):
        base.forward = MethodType(_causal_lm_forward, base)


def rope_module(model: Any) -> Any:
    """Return the module whose `apply_rotary_pos_emb` the model calls; None if it has none."""
    module = sys.modules[type(model).__module__]
    return module if hasattr(module, "apply_rotary_pos_emb") else None


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *_: Any, **__: Any
) -> Any:
    """Stand for liger_rotary_pos_emb."""
    return _call(_Rope, q, k, cos, sin)


def _call(function: Any, *args: Any) -> Any:
    """Apply an autograd function, whose `apply` torch leaves without types."""
    return function.apply(*args)


def _norm_forward(self: Any, hidden_states: torch.Tensor) -> Any:
    return _call(_RmsNorm, hidden_states, self.weight)


def _mlp_forward(self: Any, x: torch.Tensor) -> Any:
    return self.down_proj(_call(_SiluMul, self.gate_proj(x), self.up_proj(x)))


def _fused_mlp_forward(self: Any, x: torch.Tensor) -> Any:
    gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
    return self.down_proj(_call(_SiluMul, gate, up))


def _causal_lm_forward(self: Any, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    kwargs.pop("num_items_in_batch", None)
    kwargs["use_cache"] = False
    hidden = self.base_model(*args, **kwargs).last_hidden_state
    flat = hidden.reshape(-1, hidden.shape[-1])
    loss = _call(_LinearCrossEntropy, flat, self.get_output_embeddings().weight)
    return CausalLMOutputWithPast(loss=loss)
