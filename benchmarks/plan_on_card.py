"""Plan and train in the memory of a small card, on the GPU that is here, and write down both.

    python benchmarks/plan_on_card.py --tokenizer FOLDER --text GSM8K.jsonl --out FOLDER

The model has the figures of a bundled architecture and random weights, saved to a folder, so that
the folder path (safetensors, tokenizer, data) is the user's own. `plan` starts from nothing; it
probes the tutorial configuration itself as its baseline, in the same run. `train` then runs the
plan on rows that fill the sequence. Results go to OUT: plan.json, probes.jsonl, train.json,
summary.json. The rows are pieces of the text of length SEQ; a random model learns little from them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

CLI = [sys.executable, "-m", "lora_advisor.cli"]


def make_model(name: str, tokenizer: Path, folder: Path) -> None:
    """Save a model of random weights and its tokenizer; runs in a process of its own."""
    from transformers import AutoTokenizer

    from lora_advisor.probes.architectures import load_bundled
    from lora_advisor.probes.config import LoraShape, RunConfig
    from lora_advisor.probes.weights import quantise_layer, random_model

    config = RunConfig(
        model=name, method="lora", micro_batch=1, seq_len=64, optimizer="adamw_torch_fused",
        precision="bf16", checkpointing="off", attention="sdpa", kernels="none", loss="fused",
        lora=LoraShape(r=8, alpha=16, dropout=0.0, targets="all-linear"), compile="off",
        allocator="default",
    )  # fmt: skip
    random_model(config, load_bundled(name), "cuda", quantise=quantise_layer).save_pretrained(
        folder
    )
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def make_data(text: Path, file: Path, *, rows: int, characters: int) -> None:
    """Write rows of text long enough to fill a sequence."""
    lines = [json.loads(line) for line in text.read_text("utf-8").splitlines()]
    whole = "\n".join(f"{line['question']}\n{line['answer']}" for line in lines)
    pieces = [whole[i : i + characters] for i in range(0, len(whole) - characters, characters)]
    kept = [pieces[i % len(pieces)] for i in range(rows)]
    file.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in kept))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-1.5b")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--vram", default="8")
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--budget", default="200s")
    parser.add_argument("--steps", type=int, default=120, help="Training steps; 0 to plan only.")
    parser.add_argument("--plan", type=Path, help="Train with this plan instead of planning.")
    parser.add_argument("--record", type=Path, help="Probe results to go on from (default: none).")
    parser.add_argument("--plan-args", default="", help="More options of `plan`.")
    parser.add_argument("--work", type=Path, default=Path("/tmp/plan_on_card"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--make-model-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    model, data = arguments.work / arguments.model, arguments.work / "text.jsonl"
    if arguments.make_model_only:
        make_model(arguments.model, arguments.tokenizer, model)
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not model.exists():
        subprocess.run([sys.executable, *sys.argv, "--make-model-only"], check=True)
    make_data(arguments.text, data, rows=600, characters=6 * arguments.seq)
    plan_file = arguments.out / "plan.json"
    plan_s = None
    if arguments.plan is not None:
        plan_file.write_text(arguments.plan.read_text())
    else:
        record = arguments.out / "probes.jsonl"
        if arguments.record is not None:
            record.write_text(arguments.record.read_text())
        started = time.monotonic()
        subprocess.run(
            [*CLI, "plan", "--model", str(model), "--vram", arguments.vram, "--seq",
             str(arguments.seq), "--budget", arguments.budget, "--record",
             str(record), "--out", str(plan_file), *arguments.plan_args.split()],
            check=True,
        )  # fmt: skip
        plan_s = time.monotonic() - started
    plan = json.loads(plan_file.read_text())
    write_summary(arguments.out, plan, plan_s, None, 0.0)
    if arguments.steps == 0:
        return
    started = time.monotonic()
    result = subprocess.run(
        [*CLI, "train", str(plan_file), "--data", str(data),
         "--output", str(arguments.work / "run"), "--max-steps", str(arguments.steps),
         "--save-steps", "1000", "--holdout", "0.02", "--json"],
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    trained = json.loads(result.stdout.strip().splitlines()[-1])
    (arguments.out / "train.json").write_text(json.dumps(trained, indent=1) + "\n")
    write_summary(arguments.out, plan, plan_s, trained, time.monotonic() - started)


def write_summary(
    out: Path, plan: dict, plan_s: float | None, trained: dict | None, train_s: float
) -> None:
    """Write the figures that the documents quote."""
    chosen, baseline = plan["chosen"], plan["baseline"]

    def speed(measured: dict) -> float:
        steps = sorted(measured["step_times_s"])
        middle = len(steps) // 2
        median = steps[middle] if len(steps) % 2 else (steps[middle - 1] + steps[middle]) / 2
        return measured["tokens_per_step"] / median

    mine, theirs = speed(chosen["measured"]), speed(baseline["measured"])
    summary = {
        "machine": plan["machine"]["name"],
        "stack": plan["stack"],
        "vram_bytes": plan["spec"]["vram_bytes"],
        "cap_bytes": plan["cap_bytes"],
        "chosen": chosen["config"],
        "tokens_per_s": mine,
        "baseline_tokens_per_s": theirs,
        "times_the_baseline": mine / theirs,
        "reserved_bytes": chosen["measured"]["reserved_bytes"],
        "process_bytes": chosen["measured"]["process_bytes"],
        "alloc_retries": chosen["measured"]["alloc_retries"],
        "probes": plan["probes"],
        "probing_s": plan["probing_s"],
        "plan_wall_s": plan_s,
        "training": None
        if trained is None
        else {"steps": trained["steps"], "wall_s": train_s, "measured": trained["measured"],
              "predicted": trained["predicted"]},
    }  # fmt: skip
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
