"""A frozen product and its adapter's share in one tensor: values, gradients, rounding, and what a
trace counts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.library import opcheck

from lora_advisor.probes.adapter_products import (
    INPUT_GRADIENT,
    PRODUCT,
    adapted_product,
)
from lora_advisor.probes.events import Work
from lora_advisor.probes.fused_adapter import _fill, _has_own_kernel
from lora_advisor.probes.kernel_costs import PACKED_ROWS, describe, issued
from lora_advisor.probes.stand_ins import compiled_program

ROWS, WIDTH, OUT, RANK = 24, 32, 48, 8


def drawn(*shape: int, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(**options)


def factors(**options: Any) -> dict[str, torch.Tensor]:
    return {
        "a": drawn(RANK, WIDTH, **options).requires_grad_(),
        "b": drawn(OUT, RANK, **options).requires_grad_(),
        "weight": drawn(OUT, WIDTH, **options),
        "bias": drawn(OUT, **options),
    }


def plain(x: torch.Tensor, f: dict[str, torch.Tensor], *, bias: bool) -> torch.Tensor:
    linear = torch.nn.functional.linear
    return linear(x, f["weight"], f["bias"] if bias else None) + linear(linear(x, f["a"]), f["b"])


def own(x: torch.Tensor, f: dict[str, torch.Tensor], *, bias: bool) -> torch.Tensor:
    inner = torch.nn.functional.linear(x.detach(), f["a"].detach())
    output: torch.Tensor = adapted_product(x, inner, f["a"], f["b"], f["weight"])
    return output + f["bias"] if bias else output


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(ROWS, WIDTH), (4, 6, WIDTH)])
def test_output_and_gradients_are_those_of_the_plain_products(
    shape: tuple[int, ...], bias: bool, compiled: bool
) -> None:
    f = factors(dtype=torch.float64)
    x = drawn(*shape, dtype=torch.float64).requires_grad_()
    leaves = [x, f["a"], f["b"]]
    expected = plain(x, f, bias=bias)
    outer = torch.sin(expected.detach())
    of_plain = torch.autograd.grad(expected, leaves, outer)
    product: Any = torch.compile(own, backend="aot_eager") if compiled else own

    output = product(x, f, bias=bias)
    found = torch.autograd.grad(output, leaves, outer)

    torch.testing.assert_close(output, expected)
    for one, other in zip(found, of_plain, strict=True):
        torch.testing.assert_close(one, other)


def test_rows_that_need_no_gradient_get_none() -> None:
    f = factors(dtype=torch.float32)
    x = drawn(ROWS, WIDTH, dtype=torch.float32)

    torch.autograd.backward(own(x, f, bias=True).sum())

    assert x.grad is None and f["weight"].grad is None
    assert f["a"].grad is not None and f["b"].grad is not None


def test_pytorchs_own_checks_of_an_operation_pass() -> None:
    f = factors(dtype=torch.float32)
    x = drawn(4, 6, WIDTH, dtype=torch.float32).requires_grad_()
    inner = torch.nn.functional.linear(x.detach(), f["a"].detach())
    product: Any = torch.ops.lora_advisor.adapted_product.default
    gradient: Any = torch.ops.lora_advisor.adapted_input_gradient.default

    opcheck(product, (x, inner, f["a"], f["b"], f["weight"]))
    outer = drawn(4, 6, OUT, dtype=torch.float32)
    into = drawn(4, 6, RANK, dtype=torch.float32)
    opcheck(gradient, (outer, into, f["a"].detach(), f["weight"]))


@pytest.mark.parametrize("bias", [None, 100.3])
def test_a_share_far_below_the_outputs_last_place_is_not_lost(bias: float | None) -> None:
    """Added to a rounded product it is, where it is below half of its last place."""
    layer = torch.nn.Linear(256, OUT, bias=bias is not None, dtype=torch.bfloat16)
    layer.weight.data.copy_(drawn(OUT, 256))
    if bias is not None:
        layer.bias.data.fill_(bias)
    rows = drawn(4096, 256, dtype=torch.bfloat16)
    inner = torch.full((4096, 1), 1 / 128, dtype=torch.bfloat16)
    factor_b = torch.ones(OUT, 1, dtype=torch.bfloat16)
    output = torch.empty(4096, OUT, dtype=torch.bfloat16)
    with torch.no_grad():
        exact = layer.double()(rows.double())
        layer.to(torch.bfloat16)

        _fill(output, rows, inner, factor_b, layer)
        after = layer(rows).addmm_(inner, factor_b.t())

    large = exact.abs() > 8  # whose last place is 1/16 and more, the share an eighth of it at most
    assert large.sum() > 50_000
    share = 1 / 128
    assert (output.double() - exact)[large].mean().item() == pytest.approx(share, rel=0.25)
    assert (after.double() - exact)[large].mean().item() < share / 4


def test_few_rows_and_weights_that_a_cpu_has_packed_are_bitsandbytes_to_multiply() -> None:
    def layer(state: Any) -> Any:
        return SimpleNamespace(weight=SimpleNamespace(quant_state=state))

    few, many = torch.empty(PACKED_ROWS, 1), torch.empty(PACKED_ROWS + 1, 1)
    plain, packed = SimpleNamespace(), SimpleNamespace(packing_format_for_cpu=True)

    assert not _has_own_kernel(layer(None), few)
    assert _has_own_kernel(layer(plain), few) and not _has_own_kernel(layer(plain), many)
    assert _has_own_kernel(layer(packed), many)


def cost_of(name: str, *args: torch.Tensor) -> tuple[Any, Work]:
    operations = torch.ops.lora_advisor
    operation: Any = getattr(operations, name.split("::")[1]).default
    cost = describe(operation, args, {}, "9.0")
    with compiled_program():
        return cost, issued(cost.work(operation(*args)), operation.name(), by_engine=True)


def test_a_trace_counts_both_products_and_what_the_thin_one_moves() -> None:
    rows, width, out, rank = 2048, 512, 1024, 8
    x, weight = drawn(rows, width, dtype=torch.bfloat16), drawn(out, width, dtype=torch.bfloat16)
    inner, a = drawn(rows, rank, dtype=torch.bfloat16), drawn(rank, width, dtype=torch.bfloat16)
    b = drawn(out, rank, dtype=torch.bfloat16)

    cost, work = cost_of(PRODUCT, x, inner, a, b, weight)
    assert cost.multiplies and not cost.fuses
    assert work.matmul_flops == 2 * rows * width * out
    assert work.bytes_moved == 2 * (rows * rank + rank * out + rows * out)
    assert work.compiled_custom_launches == 1 and work.kernels == 1

    cost, work = cost_of(INPUT_GRADIENT, drawn(rows, out, dtype=torch.bfloat16), inner, a, weight)
    assert cost.multiplies and not cost.fuses
    assert work.matmul_flops == 2 * rows * width * out
    assert work.bytes_moved == 2 * (rows * rank + rank * width + rows * width)


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True])
def test_a_compiled_checkpointed_layer_learns_the_same_on_a_gpu(bias: bool) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device here")
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    f = factors(**options)
    x = drawn(4, 6, WIDTH, **options).requires_grad_()
    leaves = [x, f["a"], f["b"]]
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in f.items()}
    rows = x.detach().double().requires_grad_()
    of_exact = torch.autograd.grad(
        torch.sin(plain(rows, exact, bias=bias)).sum(), [rows, exact["a"], exact["b"]]
    )

    def layer(x: torch.Tensor) -> torch.Tensor:
        return torch.sin(own(x, f, bias=bias))

    compiled = torch.compile(layer, dynamic=False)
    output = torch.utils.checkpoint.checkpoint(compiled, x, use_reentrant=False)
    found = torch.autograd.grad(output.sum(), leaves)

    for one, other in zip(found, of_exact, strict=True):
        assert float((one.double() - other).norm() / other.norm()) < 0.03
