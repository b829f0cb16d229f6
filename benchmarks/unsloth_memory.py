"""How much memory Unsloth's step takes beside the step of ours that is traced for it.

    python benchmarks/unsloth_memory.py [--out benchmarks/results/unsloth_memory.json]

Measured are Unsloth's steps in the files of contenders.py (its own checkpointing, all-linear r=16,
bf16, optimizer adamw_8bit, segments that expand, an H100); traced is what `unsloth.stand_in` names.
Each step's live tensors and reserve are set beside what a plan predicts.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from lora_advisor.advisor.predictor import Predictor
from lora_advisor.probes import unsloth
from lora_advisor.probes.architectures import resolve_architecture
from lora_advisor.probes.cards import find_card
from lora_advisor.probes.config import LoraShape, RunConfig

RESULTS = Path(__file__).resolve().parent / "results"


def steps() -> list[dict[str, Any]]:
    """Return the measured steps, each once."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for file in sorted(RESULTS.glob("contenders_*.json")):
        document = json.loads(file.read_text("utf-8"))
        for run in document["runs"]:
            if not run["who"].startswith("Unsloth") or run["outcome"] != "ok":
                continue
            step = {
                "model": document["model"],
                "seq_len": document["seq_len"],
                "method": run["who"].split()[-1],
                "micro_batch": run["micro_batch"],
                "allocated_bytes": run["allocated_bytes"],
                "reserved_bytes": run["reserved_bytes"],
            }
            found.setdefault(tuple(list(step.values())[:5]), step)
    return list(found.values())


def predicted(step: dict[str, Any], predictors: dict[str, Predictor]) -> dict[str, Any]:
    """Return a step with what a plan would predict of it before any probe."""
    card = find_card("h100-80gb")
    model = step["model"]
    if model not in predictors:
        predictors[model] = Predictor.start(
            resolve_architecture(model), card.machine(), card, limit_bytes=card.memory_bytes
        )
    config = RunConfig(
        model=model, method=step["method"], micro_batch=step["micro_batch"], accumulation=1,
        seq_len=step["seq_len"], optimizer="adamw_8bit", precision="bf16",
        lora=LoraShape(r=16, alpha=32, dropout=0.0, targets="all-linear"), **unsloth.AS_IT_IS,
    )  # fmt: skip
    memory = predictors[model].predict(config).memory
    ratios = {
        name: round(step[name] / getattr(memory, name) - 1, 4)
        for name in ("allocated_bytes", "reserved_bytes")
    }
    print(model, step["method"], step["micro_batch"], step["seq_len"], ratios, flush=True)
    return {**step, "measured_against_predicted": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "unsloth_memory.json")
    arguments = parser.parse_args()
    predictors: dict[str, Predictor] = {}
    rows = [predicted(step, predictors) for step in steps()]
    errors = {
        name: {
            "median": round(statistics.median(abs(e) for e in found), 4),
            "lowest": min(found),
            "highest": max(found),
        }
        for name in ("allocated_bytes", "reserved_bytes")
        if (found := [row["measured_against_predicted"][name] for row in rows])
    }
    document = {"engine": "unsloth 2026.10.9", "errors": errors, "steps": rows}
    arguments.out.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    print(json.dumps(errors, indent=1))


if __name__ == "__main__":
    main()
