"""Time a frozen layer's products with 8-bit weights beside those with bf16, on this GPU.

    python benchmarks/eight_bit_products.py --out FILE.json
    python benchmarks/eight_bit_products.py --show FILE.json

What an 8-bit base could bring: for the layers of three models, forward product and the input's
gradient in bf16; in fp8 with a scale a row (`torch._scaled_mm`) and in int8 (`torch._int_mm`, whose
int32 result would still have to be scaled); and what fp8 needs beside them: activations and
gradients quantised row by row in a compiled kernel, and the weight turned over for the backward
product, which the kernel wants the other way round. Median microseconds in a CUDA graph of twenty.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from replays import replay_times

#: Hidden width, width of the MLP.
MODELS = {"qwen2.5-1.5b": (1536, 8960), "llama-3.2-1b": (2048, 8192), "qwen2.5-7b": (3584, 18944)}
TOKENS = (1024, 3072, 6144)
FP8 = torch.float8_e4m3fn
_LARGEST = 448.0  # of e4m3


def timed(call: Callable[[], Any], count: int = 20) -> float:
    """Return the median microseconds of a call."""
    for _ in range(4):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            call()
    return round(statistics.median(replay_times(graph, 6)[1:]) / count, 1)


@torch.compile
def quantised(rows: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows times a scale for each column in fp8, and the scale of each row."""
    scaled = rows.float() * scale
    largest = scaled.abs().amax(-1, keepdim=True).clamp(min=1e-12) / _LARGEST
    return (scaled / largest).to(FP8), largest


def product(tokens: int, wide: int, out: int) -> dict[str, Any]:
    """Time a layer of (out, wide) on so many tokens."""
    half: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    rows, gradient = torch.randn(tokens, wide, **half), torch.randn(tokens, out, **half)
    weight = torch.randn(out, wide, **half) * 0.02
    scale = weight.abs().amax(-1, keepdim=True).float() / _LARGEST
    small = (weight.float() / scale).to(FP8)
    turned = small.t().contiguous().t()
    ones = torch.ones(1, wide, device="cuda")
    rows8, row_scale = quantised(rows, ones)
    gradient8, gradient_scale = quantised(gradient, scale.t())
    ints = [torch.randint(-127, 127, shape, device="cuda", dtype=torch.int8)
            for shape in ((tokens, wide), (out, wide))]  # fmt: skip

    def scaled(a: torch.Tensor, b: torch.Tensor, of_a: torch.Tensor, of_b: torch.Tensor) -> Any:
        return torch._scaled_mm(a, b, of_a, of_b, out_dtype=torch.bfloat16, use_fast_accum=True)

    def forward() -> Any:
        return scaled(rows8, small.t(), row_scale, scale.view(1, -1))

    plain = torch.nn.functional.linear(rows, weight).float()
    error = (forward().float() - plain).norm() / plain.norm()
    return {
        "bf16": timed(lambda: torch.nn.functional.linear(rows, weight)),
        "bf16_backward": timed(lambda: gradient @ weight),
        "fp8": timed(forward),
        "fp8_backward": timed(lambda: scaled(gradient8, turned, gradient_scale, ones)),
        "quantise_rows": timed(lambda: quantised(rows, ones)),
        "quantise_gradient": timed(lambda: quantised(gradient, scale.t())),
        "turn_weight": timed(lambda: small.t().contiguous()),
        "weight_to_bf16": timed(lambda: small.to(torch.bfloat16)),
        "int8": timed(lambda: torch._int_mm(ints[0], ints[1].t())),
        "fp8_error": round(float(error), 4),
    }


def show(file: Path) -> None:
    """Print the sums of an MLP as a table in Markdown."""
    from tabulate import tabulate

    runs = json.loads(file.read_text("utf-8"))["runs"]
    table = []
    for model in MODELS:
        for tokens in TOKENS:
            found = {r["layer"]: r for r in runs if (r["model"], r["tokens"]) == (model, tokens)}

            def mlp(*names: str, found: dict[str, Any] = found) -> float:
                up, down = found["up"], found["down"]
                return float(sum(2 * up[name] + down[name] for name in names))

            own = mlp("fp8") + found["up"]["quantise_rows"] + found["down"]["quantise_rows"]
            back = mlp("fp8_backward", "quantise_gradient")
            figures = (mlp("bf16"), own, mlp("bf16_backward"), back, mlp("turn_weight"))
            table.append([model, tokens, *(round(figure) for figure in figures)])
    heads = ["model", "tokens", "bf16", "fp8, rows quantised", "backward, bf16",
             "backward, fp8, gradients quantised", "weights turned over"]  # fmt: skip
    print(tabulate(table, heads, tablefmt="pipe", intfmt=","))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--show", type=Path)
    arguments = parser.parse_args()
    if arguments.show is not None:
        show(arguments.show)
        return
    torch.manual_seed(0)
    runs = []
    for model, (hidden, inner) in MODELS.items():
        layers = {"up": (hidden, inner), "down": (inner, hidden), "q": (hidden, hidden)}
        for tokens in TOKENS:
            for layer, (wide, out) in layers.items():
                times = product(tokens, wide, out)
                runs.append({"model": model, "tokens": tokens, "layer": layer, **times})
                print(runs[-1], flush=True)
    arguments.out.write_text(json.dumps({
        "date": time.strftime("%Y-%m-%d"), "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__, "runs": runs,
    }, indent=1) + "\n", "utf-8")  # fmt: skip


if __name__ == "__main__":
    main()
