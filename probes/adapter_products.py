"""A frozen product and its adapter's share, multiplied into one tensor.

The adapter's share is multiplied out first, and the frozen product is added to it while its tiles
are still in registers (cuBLAS, beta = 1). The other way round the thin product would read and write
the whole output once more by itself: for Qwen2.5-1.5B's MLP on an H100 a fifth of the product's
time (benchmarks/adapter_products.py). The sum is also rounded once and not twice, so that no share
of a small adapter is lost to the rounding of the frozen product.

Inductor would make a tensor of its own of each product and add them in another pass; for it the
same stands as an operation with its derivative, which it calls as it is.
"""

from __future__ import annotations

from typing import Any

import torch

#: Names of the operations, as a dispatch mode sees them.
PRODUCT = "lora_advisor::adapted_product"
INPUT_GRADIENT = "lora_advisor::adapted_input_gradient"


def product_into(
    output: torch.Tensor,
    rows: torch.Tensor,
    inner: torch.Tensor,
    factor_b: torch.Tensor,
    weight: torch.Tensor,
) -> torch.Tensor:
    """Fill `output`, (rows, out), with rows W' + inner B' and return it.

    A bias is for the caller to add: added to the share alone, both would be rounded at its size.

    Args:
        output: Its values are not read.
        rows: (rows, in).
        inner: (rows, rank), the scale included.
        factor_b: (out, rank).
        weight: (out, in).
    """
    torch.mm(inner, factor_b.t(), out=output)
    return output.addmm_(rows, weight.t())


def input_gradient(
    outer: torch.Tensor, into: torch.Tensor, factor_a: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Return the gradient of the rows, (rows, in): outer W + into A.

    Args:
        outer: The output's gradient, (rows, out).
        into: That of the inner product, (rows, rank).
        factor_a: (rank, in), the scale included.
        weight: (out, in).
    """
    return (into @ factor_a).addmm_(outer, weight)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


@torch.library.custom_op(PRODUCT, mutates_args=())
def adapted_product(
    rows: torch.Tensor,
    inner: torch.Tensor,
    factor_a: torch.Tensor,
    factor_b: torch.Tensor,
    weight: torch.Tensor,
) -> torch.Tensor:
    """Return (..., out) of rows (..., in); the gradients of rows and both factors follow from it.

    Args:
        rows: (..., in).
        inner: rows A', (..., rank), which gets no gradient.
        factor_a: (rank, in), the scale included.
        factor_b: (out, rank).
        weight: (out, in), frozen.
    """
    output = rows.new_empty(*rows.shape[:-1], weight.shape[0])
    product_into(_flat(output), _flat(rows), _flat(inner), factor_b, weight)
    return output


@adapted_product.register_fake
def _(rows: Any, inner: Any, factor_a: Any, factor_b: Any, weight: Any) -> torch.Tensor:
    output: torch.Tensor = rows.new_empty(*rows.shape[:-1], weight.shape[0])
    return output


@torch.library.custom_op(INPUT_GRADIENT, mutates_args=())
def adapted_input_gradient(
    outer: torch.Tensor, into: torch.Tensor, factor_a: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Return `input_gradient`, for tensors of any number of dimensions."""
    gradient = input_gradient(_flat(outer), _flat(into), factor_a, weight)
    return gradient.view(*outer.shape[:-1], weight.shape[1])


@adapted_input_gradient.register_fake
def _(outer: Any, into: Any, factor_a: Any, weight: Any) -> torch.Tensor:
    gradient: torch.Tensor = outer.new_empty(*outer.shape[:-1], weight.shape[1])
    return gradient


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _derive(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    rows, inner, factor_a, factor_b, weight = ctx.saved_tensors
    into = outer @ factor_b
    of_b = _flat(outer).t() @ _flat(inner)
    of_a = _flat(into).t() @ _flat(rows)
    of_rows = None
    if ctx.needs_input_grad[0]:
        of_rows = adapted_input_gradient(outer, into, factor_a, weight)
    return of_rows, None, of_a, of_b, None


adapted_product.register_autograd(_derive, setup_context=_keep)
