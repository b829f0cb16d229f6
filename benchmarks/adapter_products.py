"""Time a frozen product with its adapter on the GPU that is here, in either order.

    python benchmarks/adapter_products.py --out FILE.json

Each case is captured as a CUDA graph and replayed, so that no host is waited for; medians of 20, in
microseconds. Parts: the frozen product alone, with the adapter's share added after it, with the
share first and the product added to it (`probes/adapter_products.py`), and as one product whose
factors are widened by the adapter's; the same for the gradient of the input. Then a gated MLP,
forward and backward, as the compiler fuses plain operations and as it calls the project's own.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from replays import replay_times

from lora_advisor.probes.adapter_products import adapted_product, input_gradient, product_into
from lora_advisor.probes.machine import detect_machine, detect_stack

RANK, BF16 = 16, torch.bfloat16
#: Rows, inputs and outputs: Qwen2.5-1.5B's and Llama-3.2-1B's MLPs, and a product of attention.
SHAPES = (
    (3072, 1536, 8960), (12288, 1536, 8960), (3072, 8960, 1536), (12288, 8960, 1536),
    (12288, 1536, 1536), (6144, 2048, 8192), (6144, 8192, 2048),
)  # fmt: skip
#: Rows, hidden and intermediate size.
MLPS = ((3072, 1536, 8960), (12288, 1536, 8960), (6144, 2048, 8192))


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").mul_(shape[-1] ** -0.5).to(BF16)


def microseconds(run: Callable[[], Any]) -> float:
    """Return the median time of a replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return round(statistics.median(replay_times(graph, 23)[3:]), 1)


def parts(rows: int, width: int, out: int) -> dict[str, float]:
    """Return the times of one product and of its input's gradient."""
    x, weight, outer = drawn(rows, width), drawn(out, width), drawn(rows, out)
    inner, a, b = drawn(rows, RANK), drawn(RANK, width), drawn(out, RANK)
    wide_x, wide_weight = drawn(rows, width + RANK), drawn(out, width + RANK)
    output = torch.empty(rows, out, device="cuda", dtype=BF16)
    return {
        "forward, frozen alone": microseconds(lambda: x @ weight.t()),
        "forward, share after": microseconds(lambda: (x @ weight.t()).addmm_(inner, b.t())),
        "forward, share first": microseconds(lambda: product_into(output, x, inner, b, weight)),
        "forward, factors widened": microseconds(lambda: wide_x @ wide_weight.t()),
        "gradient, frozen alone": microseconds(lambda: outer @ weight),
        "gradient, share after": microseconds(lambda: (outer @ weight).addmm_(inner, a)),
        "gradient, share first": microseconds(lambda: input_gradient(outer, inner, a, weight)),
    }


def plain(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    linear = torch.nn.functional.linear
    return linear(x, weight) + linear(linear(x, a.to(BF16)), b.to(BF16))


def own(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    factor = a.to(BF16)
    inner = torch.nn.functional.linear(x.detach(), factor.detach())
    output: torch.Tensor = adapted_product(x, inner, factor, b.to(BF16), weight)
    return output


def mlp(rows: int, hidden: int, intermediate: int) -> dict[str, float]:
    """Return the times of a gated MLP, forward and backward, compiled either way."""
    sizes = ((hidden, intermediate), (hidden, intermediate), (intermediate, hidden))
    layers = [
        (
            drawn(RANK, width).float().requires_grad_(),
            drawn(out, RANK).float().requires_grad_(),
            drawn(out, width),
        )
        for width, out in sizes
    ]
    x, outer = drawn(rows, hidden).requires_grad_(), drawn(rows, hidden)
    leaves = [x, *(factor for layer in layers for factor in layer[:2])]
    found, gradients = {}, []
    for name, product in (("plain operations", plain), ("own operation", own)):

        def run(rows: torch.Tensor, product: Any = product) -> torch.Tensor:
            gate, up, down = layers
            gated = torch.nn.functional.silu(product(rows, *gate)) * product(rows, *up)
            output: torch.Tensor = product(gated, *down)
            return output

        torch._dynamo.reset()
        compiled = torch.compile(run, dynamic=False)

        def step(compiled: Any = compiled) -> Any:
            return torch.autograd.grad(compiled(x), leaves, outer)

        gradients.append([g.float() for g in step()])
        found[name] = microseconds(step)
    apart = max(
        float((one - other).norm() / one.norm()) for one, other in zip(*gradients, strict=True)
    )
    return {**found, "gradients apart": round(apart, 5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    found = {
        "machine": detect_machine("cuda").to_json(),
        "stack": detect_stack().to_json(),
        "rank": RANK,
        "products_us": {" x ".join(map(str, shape)): parts(*shape) for shape in SHAPES},
        "mlp_us": {" x ".join(map(str, shape)): mlp(*shape) for shape in MLPS},
    }
    arguments.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
