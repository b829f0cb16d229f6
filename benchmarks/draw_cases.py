"""Draw configurations at random over architectures and the whole space, before they are measured.

    python benchmarks/draw_cases.py --seed N --count N > CASES.jsonl

Each line is a RunConfig. The seed is written down with the results; nothing about the draw follows
from how well a case is predicted. Sizes are drawn so that a case fits one 80 GB card.
"""

from __future__ import annotations

import argparse
import json
import random
from typing import Any

from lora_advisor.probes.config import LoraShape, RunConfig
from lora_advisor.probes.errors import UsageError

MODELS = (
    "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b", "qwen3-0.6b", "qwen3-1.7b",
    "qwen3-4b", "llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b", "llama-2-7b", "mistral-7b",
    "gemma-2-2b", "gemma-3-1b", "phi-3.5-mini", "smollm2-135m", "smollm2-360m", "smollm2-1.7b",
    "tinyllama-1.1b",
)  # fmt: skip
LARGE = ("7b", "8b")
OPTIMIZERS = (
    "adamw_torch_fused", "adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit",
    "adafactor", "lion_8bit", "sgd",
)  # fmt: skip
TARGETS = (
    "all-linear",
    ("q_proj", "v_proj"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
)


def draw(random: random.Random) -> RunConfig | None:
    """Draw one configuration; None where the words drawn are no legal one."""
    model = random.choice(MODELS)
    large = any(size in model for size in LARGE)
    method = random.choice(("lora", "lora", "qlora", "qlora", "full"))
    trainer = random.choice(("trl", "trl", "transformers", "loop"))
    kernels = random.choice(("none", "none", "liger")) if trainer != "loop" else "none"
    seq_len = random.choice((256, 512, 768, 1024, 1536, 2048, 3072, 4096))
    tokens = random.choice((512, 1024, 2048, 4096, 8192, 16384))
    targets = TARGETS[0] if model.startswith("phi") else random.choice(TARGETS)
    values: dict[str, Any] = {
        "model": model,
        "trainer": trainer,
        "method": method,
        "quant_type": random.choice(("nf4", "fp4")) if method == "qlora" else None,
        "double_quant": random.choice((True, False)) if method == "qlora" else None,
        "micro_batch": max(1, tokens // seq_len),
        "accumulation": random.choice((1, 1, 2)),
        "seq_len": seq_len,
        "optimizer": random.choice(OPTIMIZERS),
        "precision": random.choice(("bf16", "bf16", "bf16", "fp16", "fp32")),
        "checkpointing": random.choice(("full", "full", "off", "every_2", "every_3", "offload")),
        "attention": "eager" if model == "gemma-2-2b" else random.choice(("sdpa", "sdpa", "eager")),
        "kernels": kernels,
        "loss": "fused" if trainer == "trl" or kernels == "liger" else "full",
        "fp32_upcast": method == "qlora" and random.random() < 0.3,
        "lora": None
        if method == "full"
        else LoraShape(
            r=random.choice((8, 16, 32, 64)),
            alpha=32,
            dropout=random.choice((0.0, 0.0, 0.05)),
            targets=targets,
        ),
        "compile": random.choice(("off", "off", "off", "off", "layers")),
        "allocator": random.choice(("default", "default", "expandable_segments")),
        "packing": trainer == "trl" and random.random() < 0.15,
    }
    if large and (method == "full" or values["precision"] == "fp32"):
        return None
    if values["compile"] == "layers" and (
        kernels == "liger" or method == "qlora" or values["checkpointing"] == "offload"
    ):
        # Liger breaks the graph or fails; 4-bit layers compile to other graphs in another torch.
        return None
    if values["attention"] == "eager" and seq_len > 2048:
        return None
    if values["checkpointing"] == "off" and tokens > 8192:
        return None
    try:
        return RunConfig(**values)
    except UsageError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--count", type=int, default=40)
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    drawn: list[RunConfig] = []
    while len(drawn) < arguments.count:
        config = draw(generator)
        if config is not None and config not in drawn:
            drawn.append(config)
    for config in drawn:
        print(json.dumps(config.to_json()))


if __name__ == "__main__":
    main()
