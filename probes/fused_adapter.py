"""peft's LoRA layers with a frozen product and its adapter computed together.

What peft's own forward pass spends beside the products themselves is left out: the input cast to
the adapter's fp32 and back (peft/tuners/lora/layer.py, `_cast_input_dtype`), a clone of the output
of 4-bit weights (lora/bnb.py), the scaled update and its sum with the output as tensors of their
own, and as many passes over them backward. The frozen product is added to the adapter's share in
place instead, and so it is in the input's gradient (`adapter_products.py`); in compiled layers the
same stands as an operation that the compiler knows (`_traceable_product`). Parameters, names and
files are peft's; where a layer does anything else (dropout, merged or several adapters, variants)
peft's forward pass runs.

torch and peft are imported with this module, which `adapters.py` does when it is needed.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import layer as peft_layer
from torch.utils.checkpoint import checkpoint

from lora_advisor.probes.adapter_products import adapted_product, input_gradient, product_into
from lora_advisor.probes.kernel_costs import PACKED_ROWS

#: x W' + s x A' B', with W frozen: gradients of the input and of both factors.
_Gradients = tuple[torch.Tensor | None, ...]
#: Output, rows and inner product.
_Unfilled = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class _AdaptedProduct(torch.autograd.Function):
    """The product with a frozen weight and its adapter, in the dtype of autocast."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        factor_a: torch.Tensor,
        factor_b: torch.Tensor,
        scaling: float,
        layer: Any,
        later: list[_Unfilled] | None,
    ) -> torch.Tensor:
        """Return (..., out) of (..., in).

        Args:
            ctx: autograd's.
            x: Input, (..., in).
            factor_a: (rank, in).
            factor_b: (out, rank).
            scaling: alpha / rank.
            layer: The frozen layer, 16 or 32 bits or 4-bit; its weight gets no gradient.
            later: Takes output, rows and inner product where the output is to be filled later
                (`_fill`); None to compute it at once.
        """
        dtype = _compute_dtype(x)
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        inner = rows @ (factor_a * scaling).to(dtype).t()
        ctx.save_for_backward(rows, inner, factor_a, factor_b)
        ctx.scaling, ctx.layer, ctx.shape, ctx.dtype = scaling, layer, x.shape, x.dtype
        output = rows.new_empty(*x.shape[:-1], factor_b.shape[0])
        if later is None:
            _fill(output, rows, inner, factor_b, layer)
        else:
            later.append((output, rows, inner))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> _Gradients:
        """Return the gradients of input and factors; each factor's in its own dtype."""
        rows, inner, factor_a, factor_b = ctx.saved_tensors
        wanted, dtype = ctx.needs_input_grad, rows.dtype
        outer = gradients[0].reshape(-1, gradients[0].shape[-1]).to(dtype)
        into = outer @ factor_b.to(dtype)
        of_x = of_a = of_b = None
        if wanted[2]:
            of_b = (outer.t() @ inner).to(factor_b.dtype)
        if wanted[1]:
            of_a = (into.t() @ rows).to(factor_a.dtype).mul_(ctx.scaling)
        if wanted[0]:
            scaled = (factor_a * ctx.scaling).to(dtype)
            of_x = input_gradient(outer, into, scaled, _weight(ctx.layer, dtype))
            of_x = of_x.view(ctx.shape).to(ctx.dtype)
        return of_x, of_a, of_b, None, None, None


def _traceable_product(
    x: torch.Tensor, factor_a: torch.Tensor, factor_b: torch.Tensor, scaling: float, layer: Any
) -> torch.Tensor:
    """Return what `_AdaptedProduct` returns, in operations that a compiler knows.

    What a function of one's own saves, compiled code keeps where activation checkpointing does not
    see it (`tensors_saved_with_no_vc_check` in torch/_functorch/_aot_autograd/runtime_wrappers.py,
    torch 2.11 and 2.13), so that nothing is given back. The scale stands on the smallest tensor.
    """
    dtype = _compute_dtype(x)
    rows = x.to(dtype)
    if _is_quantised(layer):
        # Inside compiled code this is a mark: the weight is dequantised again, not kept.
        weight = checkpoint(_weight, layer, dtype, use_reentrant=False)
    else:
        weight = _weight(layer, dtype)
    scaled, factor_b = (factor_a * scaling).to(dtype), factor_b.to(dtype)
    inner = torch.nn.functional.linear(rows.detach(), scaled.detach())
    output: torch.Tensor = adapted_product(rows, inner, scaled, factor_b, weight)
    bias = _bias(layer, dtype)
    return output if bias is None else output + bias


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Return what autocast multiplies in; without it, the input's dtype."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _fill(
    output: torch.Tensor, rows: torch.Tensor, inner: torch.Tensor, factor_b: torch.Tensor,
    layer: Any,
) -> None:  # fmt: skip
    """Compute what `_AdaptedProduct` has made room for.

    What a function saves is put aside when it has returned, and a recomputation ends with the last
    tensor that is put aside (torch/utils/checkpoint.py, `_StopRecomputationError`). So the last
    product of a checkpointed layer, an MLP's way down, is not computed a second time for nothing,
    if its own output comes after that.
    """
    with torch.no_grad():
        output = output.view(-1, output.shape[-1])
        dtype, factor_b = rows.dtype, factor_b.to(rows.dtype)
        if _has_own_kernel(layer, rows):
            output.copy_(_packed_product(rows, layer)).addmm_(inner, factor_b.t())
        else:
            product_into(output, rows, inner, factor_b, _weight(layer, dtype))
        bias = _bias(layer, dtype)
        if bias is not None:
            output.add_(bias)


def _bias(layer: Any, dtype: torch.dtype) -> torch.Tensor | None:
    return None if layer.bias is None else layer.bias.to(dtype)


def _packed_product(rows: torch.Tensor, layer: Any) -> torch.Tensor:
    """Return a 4-bit layer's output from its packed weight, without the bias."""
    import bitsandbytes

    output: torch.Tensor = bitsandbytes.matmul_4bit(
        rows, layer.weight, quant_state=layer.weight.quant_state
    )
    return output


def _has_own_kernel(layer: Any, rows: torch.Tensor) -> bool:
    """Whether bitsandbytes multiplies with packed weights: few rows, as in generation, or a CPU
    that has packed them its own way in an evaluation (`packing_format_for_cpu` of their state)."""
    state = getattr(layer.weight, "quant_state", None)
    packed = getattr(state, "packing_format_for_cpu", False)
    return state is not None and (packed or rows.shape[0] <= PACKED_ROWS)


def _is_quantised(layer: Any) -> bool:
    return getattr(layer.weight, "quant_state", None) is not None


def _weight(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return a frozen layer's weight, (out, in), dequantised where it is in 4 bits."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        weight: torch.Tensor = layer.weight
        return weight.to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    dequantised: torch.Tensor = dequantize_4bit(layer.weight, state)
    return dequantised.to(dtype)


class _Fused:
    """A LoRA layer of peft whose plain case is one function.

    Attributes:
        ends_early: Whether a recomputation may end before its product.
    """

    ends_early = False

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return what peft's forward pass returns."""
        peft: Any = self
        name = _sole_plain_adapter(peft)
        if name is None or args or kwargs:
            output: torch.Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return output
        factors = (peft.lora_A[name].weight, peft.lora_B[name].weight)
        if torch.compiler.is_compiling():
            return _traceable_product(x, *factors, peft.scaling[name], peft.base_layer)
        rest = (peft.scaling[name], peft.base_layer)
        later: list[_Unfilled] | None = [] if self.ends_early else None
        apply: Any = _AdaptedProduct.apply
        adapted: torch.Tensor = apply(x, *factors, *rest, later)
        for unfilled in later or ():
            _fill(*unfilled, factors[1], peft.base_layer)
        return adapted


def _sole_plain_adapter(layer: Any) -> str | None:
    """Return the name of a layer's only active adapter; None where there is more to do."""
    names = layer.active_adapters
    if layer.disable_adapters or layer.merged or len(names) != 1:
        return None
    name: str = names[0]
    plain = (
        _multiplies_only(layer.base_layer)
        and name in layer.lora_A
        and name not in layer.lora_variant
        and isinstance(layer.lora_dropout[name], torch.nn.Identity)
        and layer.lora_B[name].bias is None
    )
    return name if plain else None


def _multiplies_only(layer: Any) -> bool:
    """Whether a frozen layer does no more than its kind: nobody put a forward pass of his own."""
    return "forward" not in vars(layer) and (
        _is_quantised(layer) or type(layer).forward is torch.nn.Linear.forward
    )


class FusedLinear(_Fused, peft_layer.Linear):  # type: ignore[misc] # peft leaves forward untyped
    """peft's layer on torch.nn.Linear."""


def fused_layers(*, ends_early: bool = False) -> dict[type[torch.nn.Module], type[torch.nn.Module]]:
    """Return the layer of peft for each frozen one, as peft takes them.

    Args:
        ends_early: Whether a recomputation ends before the product of the last layer (`_fill`).
    """
    layers: dict[type[torch.nn.Module], type[torch.nn.Module]] = {}
    try:
        from bitsandbytes.nn import Linear4bit as FrozenLinear4bit
        from peft.tuners.lora.bnb import Linear4bit
    except ImportError:  # without bitsandbytes there are no 4-bit weights either
        pass
    else:

        class FusedLinear4bit(_Fused, Linear4bit):  # type: ignore[misc]
            """peft's layer on 4-bit weights."""

        layers[FrozenLinear4bit] = FusedLinear4bit  # before torch.nn.Linear, which it is too
    layers[torch.nn.Linear] = FusedLinear
    if not ends_early:
        return layers
    return {
        frozen: type(kind.__name__, (kind,), {"ends_early": True})
        for frozen, kind in layers.items()
    }
