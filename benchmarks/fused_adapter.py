"""What the fused adapter spares of a training step, traced: bytes moved, launches and memory.

    python benchmarks/fused_adapter.py [--gpu NAME] [--seq TOKENS] [--micro-batch N] [--out FILE]

Nothing is measured here: the figures are those of a traced step, the speed what they predict for
the card. Compiled layers are traced for the card's capability, but no speed is predicted for them.
Writes results/fused_adapter.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

from lora_advisor.advisor.predictor import Predictor
from lora_advisor.probes.architectures import resolve_architecture
from lora_advisor.probes.cards import find_card
from lora_advisor.probes.config import LoraShape, RunConfig
from lora_advisor.probes.machine import detect_stack

MODELS = ("qwen2.5-1.5b", "llama-3.2-1b", "smollm2-1.7b")


def figures(predictor: Predictor, config: RunConfig) -> dict[str, float | None]:
    """Return what a step of a configuration comes to."""
    work, prediction = predictor.work(config), predictor.predict(config)
    speed = prediction.tokens_per_s if config.compile == "off" else None
    return {
        "launches": round(work.kernels),
        "gb_moved": round(work.bytes_moved / 1e9, 1),
        "tflops": round((work.matmul_flops + work.attention_flops) / 1e12, 2),
        "needed_gib": round(prediction.memory.needed_bytes / 2**30, 3),
        "tokens_per_s": None if speed is None else round(speed.value),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default="rtx-4060")
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--micro-batch", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fused_adapter.json"))
    arguments = parser.parse_args()
    card = find_card(arguments.gpu)
    rows = []
    for model in MODELS:
        predictor = Predictor.start(
            resolve_architecture(model), card.machine(), card, limit_bytes=card.memory_bytes
        )
        for method, compiled in itertools.product(("lora", "qlora"), ("off", "layers")):
            config = RunConfig(
                model=model, method=method, micro_batch=arguments.micro_batch, accumulation=2,
                seq_len=arguments.seq, optimizer="adamw_torch_fused", precision="bf16",
                checkpointing="full", attention="sdpa", kernels="none", loss="fused",
                lora=LoraShape(r=16, alpha=32, dropout=0.0, targets="all-linear"),
                compile=compiled, allocator="default",
            )  # fmt: skip
            row = {
                "model": model,
                "method": method,
                "compile": compiled,
                "peft": figures(predictor, config),
                "fused": figures(predictor, config.replace(adapter="fused")),
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    made = {
        "gpu": card.name,
        "evidence": "traced",
        "seq_len": arguments.seq,
        "micro_batch": arguments.micro_batch,
        "stack": detect_stack().to_json(),
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
