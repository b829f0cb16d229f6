"""Measure what a user could run instead of a plan, all on one GPU, under one cap of the allocator.

    python benchmarks/contenders.py --plan plan.json [--unsloth FOLDER] [--cap 7.4] --out FILE.json
    python benchmarks/contenders.py --table benchmarks/results/contenders_*.json

Contenders, each on full rows of random tokens and in a fresh process: the plan's choice (first and
again at the end); TRL's SFTTrainer and transformers' Trainer with their defaults (8 rows); the same
with every micro-batch of --sizes, with LoRA and with QLoRA; and Unsloth, whose packages are in
FOLDER (it asks for older transformers and trl than this project), with LoRA and QLoRA and every
micro-batch until memory runs out. The two trainers run with this project's settings against waits
of the host (`build_trainer`), which favours them. What counts is each contender's best. OUT gets
all runs; --table prints the best of such files in Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lora_advisor.probes.architectures import Architecture
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.forkserver import ForkServer
from lora_advisor.probes.machine import GIB, detect_machine, detect_stack
from lora_advisor.probes.plan import Plan, read_plan
from lora_advisor.probes.runner import run_probe

WARMUP, STEPS = 3, 5
#: Micro-batch of both trainers where nothing is said (transformers/training_args.py).
DEFAULT_ROWS = 8


def trl(plan: Plan, method: str, rows: int) -> RunConfig:
    """Return TRL's defaults: checkpointing, a fused loss, no kernels, nothing compiled."""
    return plan.chosen.config.replace(
        trainer="trl", method=method, quant_type="nf4" if method == "qlora" else None,
        double_quant=True if method == "qlora" else None, micro_batch=rows, accumulation=1,
        optimizer="adamw_torch_fused", checkpointing="full", kernels="none", loss="fused",
        compile="off", adapter="peft", allocator="default", embedding="device", packing=False,
        fp32_upcast=False, cuda_graph="off", recompute="layer",
    )  # fmt: skip


def transformers(plan: Plan, method: str, rows: int) -> RunConfig:
    """Return the defaults of transformers' Trainer: no checkpointing, all logits at once."""
    return trl(plan, method, rows).replace(trainer="transformers", loss="full", checkpointing="off")


def checkpointed(plan: Plan, method: str, rows: int) -> RunConfig:
    """Return what tutorials make of it for a small card: checkpointing, norms cast up in QLoRA."""
    return transformers(plan, method, rows).replace(
        checkpointing="full", fp32_upcast=method == "qlora"
    )


def contenders(plan: Plan, sizes: list[int]) -> list[tuple[str, list[RunConfig]]]:
    """Return who runs what, each in the order it is tried until memory runs out."""
    found = []
    if plan.chosen.config.loss == "one_pass":
        tiled = plan.chosen.config.replace(loss="fused", cuda_graph="off")
        found.append(("the plan with TRL's loss", [tiled]))
    found += [
        ("TRL, defaults", [trl(plan, "lora", DEFAULT_ROWS)]),
        ("transformers, defaults", [transformers(plan, "lora", DEFAULT_ROWS)]),
    ]
    for method in ("lora", "qlora"):
        found += [
            (f"TRL, best micro-batch, {method}", [trl(plan, method, n) for n in sizes]),
            (
                f"transformers, best micro-batch, {method}",
                [checkpointed(plan, method, n) for n in sizes],
            ),
        ]
    return found


def save_random(config: RunConfig, architecture: Architecture, folder: Path) -> None:
    """Save random weights of the architecture in bf16, with a tokenizer, as others read them."""
    from lora_advisor.probes.finetune import numbered_tokenizer
    from lora_advisor.probes.weights import load_model

    model: Any = load_model(
        config.replace(method="lora", quant_type=None, double_quant=None), architecture, "cuda"
    )
    model.save_pretrained(folder)
    numbered_tokenizer(architecture.hf_config["vocab_size"]).save_pretrained(folder)


def unsloth(
    plan: Plan, where: Path, model: Path, sizes: dict[str, list[int]], cap_bytes: int, most_s: float
) -> list[dict[str, Any]]:
    """Return what Unsloth's best came to, with the methods of which sizes are given."""
    found: list[dict[str, Any]] = []
    for method in sizes:
        with TemporaryDirectory() as name:
            request, answers = Path(name) / "request.json", Path(name) / "answers.jsonl"
            request.write_text(json.dumps({
                "model": str(model), "method": method, "seq_len": plan.spec.seq_len,
                "micro_batches": sizes[method], "cap_bytes": cap_bytes, "checkpointing": "unsloth",
                "warmup_steps": WARMUP, "measured_steps": STEPS, "output_dir": name,
            }), "utf-8")  # fmt: skip
            paths = os.pathsep.join([str(where), os.environ.get("PYTHONPATH", "")])
            script = Path(__file__).with_name("unsloth_step.py").resolve()
            log, said = Path(name) / "log.txt", ""
            with log.open("w") as stream:
                try:
                    done = subprocess.run(
                        [sys.executable, str(script), str(request), str(answers)], cwd=name,
                        env={
                            **os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1",
                            "UNSLOTH_DISABLE_STATISTICS": "1",
                        },
                        stdout=stream, stderr=subprocess.STDOUT, timeout=most_s,
                    )  # fmt: skip
                    said = log.read_text("utf-8")[-1500:] if done.returncode else ""
                except subprocess.TimeoutExpired:
                    said = f"{log.read_text('utf-8')[-1500:]}\nno time left"
            lines = answers.read_text("utf-8").splitlines() if answers.is_file() else []
            if said:
                print(said, flush=True)
        for line in lines:
            answer = json.loads(line)
            found.append({"who": f"Unsloth, best micro-batch, {method}", **_timed(answer)})
            print(found[-1], flush=True)
        if said and not lines:
            found.append({"who": f"Unsloth, best micro-batch, {method}", "outcome": "failed",
                          "detail": said})  # fmt: skip
    return found


def _timed(answer: dict[str, Any]) -> dict[str, Any]:
    times = answer.get("step_times_s")
    if times:
        answer["tokens_per_s"] = answer["tokens_per_step"] / statistics.median(times)
    return answer


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return each contender's best speed, and the plan's as a multiple of it."""
    best: dict[str, float | None] = {}
    for run in runs:
        speed = run.get("tokens_per_s") if run["outcome"] == "ok" else None
        best[run["who"]] = max(best.get(run["who"]) or 0.0, speed or 0.0) or None
    ours = [run["tokens_per_s"] for run in runs if run["who"] == "the plan" and run["tokens_per_s"]]
    mean = statistics.mean(ours) if ours else None
    return {
        who: {
            "tokens_per_s": speed and round(speed),
            "plan_is_times": round(mean / speed, 3) if speed and mean else None,
        }
        for who, speed in best.items()
    }


def table(files: list[Path]) -> str:
    """Return the mean of the plan's runs and the best of the others, a row for each file."""
    from tabulate import tabulate

    rows = []
    for file in files:
        found = json.loads(file.read_text("utf-8"))
        ours = [run["tokens_per_s"] for run in found["runs"] if run["who"] == "the plan"]
        row = [f"[{found['model']}, {found['seq_len']}]({file})", f"{statistics.mean(ours):,.0f}"]
        for name in ("Unsloth, best", "TRL, best", "TRL, defaults", "transformers, "):
            best = [b["tokens_per_s"] or 0 for who, b in found["best"].items() if name in who]
            row.append(f"{max(best):,}" if any(best) else "out of memory" if best else "-")
        rival = max(
            (b["tokens_per_s"] or 0 for who, b in found["best"].items() if "Unsloth" in who),
            default=0,
        )
        rows.append([*row, f"{statistics.mean(ours) / rival:.2f}" if rival else "-"])
    heads = ["case", "the plan", "Unsloth", "TRL", "TRL's defaults", "transformers", "to Unsloth"]
    return tabulate(rows, heads, tablefmt="pipe", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=Path, nargs="+", default=None)
    parser.add_argument("--plan", type=Path)
    parser.add_argument("--unsloth", type=Path, default=None)
    parser.add_argument("--weights", type=Path, default=None, help="Where random ones are kept.")
    parser.add_argument("--cap", type=float, default=7.4, help="GiB the allocator may take.")
    parser.add_argument("--sizes", default="2,4,8,12,16,24,32,48")
    parser.add_argument(
        "--unsloth-sizes", default="lora=8,16,24 qlora=16,32,48", help="Micro-batches by method."
    )
    parser.add_argument("--unsloth-seconds", type=float, default=240.0, help="For each method.")
    parser.add_argument("--until", type=float, default=540.0, help="Start nothing after this.")
    parser.add_argument("--note", default="", help="Goes into the file: what ran beside it.")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.table is not None:
        print(table(arguments.table))
        return
    if arguments.plan is None or arguments.out is None:
        parser.error("--plan and --out must be given.")
    began = time.monotonic()
    plan = read_plan(arguments.plan)
    sizes = [int(size) for size in arguments.sizes.split(",")]
    of_unsloth = {
        method: [int(size) for size in those.split(",")]
        for method, those in (part.split("=") for part in arguments.unsloth_sizes.split())
    }
    cap_bytes = int(arguments.cap * GIB)
    machine, stack = detect_machine("cuda"), detect_stack()
    runs: list[dict[str, Any]] = []

    def left() -> float:
        return float(arguments.until - (time.monotonic() - began))

    def keep() -> None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        found = {
            "date": time.strftime("%Y-%m-%d"), "note": arguments.note,
            "machine": machine.to_json(), "stack": stack.to_json(), "model": plan.spec.model,
            "seq_len": plan.spec.seq_len, "cap_bytes": cap_bytes, "best": summary(runs),
            "runs": runs,
        }  # fmt: skip
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")

    with TemporaryDirectory() as name:
        folder = arguments.weights or Path(name) / "model"
        if arguments.unsloth is not None and not folder.exists():
            code = f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]; import contenders"
            code += "; from pathlib import Path; p = contenders.read_plan(Path(sys.argv[1])); "
            code += "contenders.save_random(p.chosen.config, p.architecture, Path(sys.argv[2]))"
            subprocess.run(
                [sys.executable, "-W", "ignore", "-c", code, str(arguments.plan), str(folder)],
                check=True,
            )
            print(f"weights written after {time.monotonic() - began:.0f} s", flush=True)

        with ForkServer(offline=True) as server:

            def measure(who: str, config: RunConfig) -> str:
                result = run_probe(
                    config, plan.architecture, machine, stack, cap_bytes=cap_bytes, record=None,
                    device="cuda", warmup_steps=WARMUP, measured_steps=STEPS, max_seconds=10.0,
                    timeout_s=120.0, server=server, allow_contention=True,
                )  # fmt: skip
                runs.append({
                    "who": who, "config": config.to_json(), "outcome": result.outcome,
                    "tokens_per_s": result.tokens_per_s, "step_times_s": result.step_times_s,
                    "allocated_bytes": result.allocated_bytes,
                    "reserved_bytes": result.reserved_bytes, "warmup_s": result.warmup_s,
                })  # fmt: skip
                print(
                    f"{time.monotonic() - began:.0f} s", who, config.micro_batch, result.outcome,
                    round(result.tokens_per_s or 0), result.detail or "", flush=True,
                )  # fmt: skip
                keep()
                return result.outcome

            measure("the plan", plan.chosen.config)
            if arguments.unsloth is not None:
                runs += unsloth(
                    plan, arguments.unsloth, folder, of_unsloth, cap_bytes,
                    arguments.unsloth_seconds,
                )  # fmt: skip
                keep()
            for who, configs in contenders(plan, sizes):
                last = 0.0
                for config in configs:
                    if left() < 30 or measure(who, config) != "ok":
                        break
                    speed = runs[-1]["tokens_per_s"]
                    if speed < last * 0.97:  # more rows no longer help
                        break
                    last = max(last, speed)
            measure("the plan", plan.chosen.config)
    print(json.dumps(summary(runs), indent=1))


if __name__ == "__main__":
    main()
