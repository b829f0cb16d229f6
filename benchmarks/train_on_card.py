"""Plan for real weights and data on the GPU that is here, train a pass, set both side by side.

    python benchmarks/train_on_card.py --model FOLDER --data gsm8k_train.jsonl --out FOLDER
        [--stage sft|dpo] [--rows N] [--budget 90s]

`plan` starts from nothing, held to the memory of a card of --vram GiB; `train` then runs it for one
pass over the data. With --stage dpo pairs are made of the rows: chosen is a question's own
solution, rejected the next row's. OUT gets plan.json, probes.jsonl, run/ (what `train` writes, the
adapter's weights and checkpoints left out) and summary.json: predicted and measured time, tokens/s
and memory, and by how much they differ.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CLI = [sys.executable, "-m", "lora_advisor.cli"]
#: Files of a run that may weigh more than all others together.
_HEAVY = ("checkpoint-*", "best-*", "*.safetensors", "*.bin", "*.pt", "tokenizer*")


def write_data(source: Path, file: Path, *, stage: str, rows: int, model: Path) -> int:
    """Write the rows or pairs to train on; return how many they are."""
    if stage == "dpo":
        from train_pairs import pairs_of

        from lora_advisor.probes.architectures import resolve_architecture
        from lora_advisor.probes.tokens import load_tokenizer

        tokenizer = load_tokenizer(resolve_architecture(str(model)))
        made = [json.dumps(row) for row in pairs_of(source, tokenizer, 512, "other")][:rows]
    else:
        with source.open(encoding="utf-8") as lines:
            made = [line.strip() for line in itertools.islice(lines, rows)]
    file.write_text("\n".join(made) + "\n", "utf-8")
    return len(made)


def summary(plan: dict[str, Any], trained: dict[str, Any], seconds: dict[str, float]) -> Any:
    predicted, measured = trained["predicted"], trained["measured"]
    both = {
        name: {
            "predicted": predicted[name],
            "measured": measured[name],
            "difference": round(measured[name] / predicted[name] - 1, 4),
        }
        for name in ("train_seconds", "padded_tokens_per_s", "peak_bytes")
        if predicted.get(name) and measured.get(name)
    }
    kept = ("rows", "holdout_rows", "truncated", "steps", "eval_loss_before", "eval_loss_after",
            "losses", "likelihood", "preference", "known", "stop", "recoveries",
            "evaluations")  # fmt: skip
    if trained.get("known"):
        trained["known"].pop("file", None)
    return {
        "model": Path(plan["spec"]["model"]).name,
        "machine": plan["machine"],
        "stack": {name: version for name, version in plan["stack"].items() if version},
        "config": {**plan["chosen"]["config"], "model": Path(plan["spec"]["model"]).name},
        "vram_bytes": plan["spec"]["vram_bytes"],
        "cap_bytes": plan["cap_bytes"],
        "plan": {key: plan[key] for key in ("probes", "probing_s", "wall_s")},
        "seconds": seconds,
        "predicted_and_measured": both,
        "measured": measured,
        "training": {key: trained.get(key) for key in kept},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--stage", choices=("sft", "dpo"), default="sft")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--vram", default="8")
    parser.add_argument("--budget", default="90s")
    parser.add_argument("--work", type=Path, default=Path("/tmp/train_on_card"))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    work, out = arguments.work / arguments.stage, arguments.out
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    data, plan_file, run = work / "rows.jsonl", out / "plan.json", work / "run"
    rows = write_data(
        arguments.data, data, stage=arguments.stage, rows=arguments.rows, model=arguments.model
    )
    print(f"{rows} rows", flush=True)
    began = time.monotonic()
    if not plan_file.exists():
        subprocess.run(
            [*CLI, "plan", "--model", str(arguments.model), "--data", str(data), "--vram",
             arguments.vram, "--stage", arguments.stage, "--budget", arguments.budget, "--record",
             str(out / "probes.jsonl"), "--out", str(plan_file)],
            check=True,
        )  # fmt: skip
    planned = time.monotonic()
    done = subprocess.run(
        [*CLI, "train", str(plan_file), "--data", str(data), "--output", str(run), "--json"],
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    seconds = {
        "plan": round(planned - began, 1), "train_in_all": round(time.monotonic() - planned, 1)
    }  # fmt: skip
    trained = json.loads(done.stdout.strip().splitlines()[-1])
    found = summary(json.loads(plan_file.read_text()), trained, seconds)
    (out / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({**found, "training": "..."}, indent=1))
    shutil.copytree(run, out / "run", ignore=shutil.ignore_patterns(*_HEAVY), dirs_exist_ok=True)


if __name__ == "__main__":
    main()
