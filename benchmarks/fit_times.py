"""Time the answers of `fit`, `plan` and `--help`, each a process; write results/fit_times.json.

    python benchmarks/fit_times.py [--out FILE]

"imports" is a process that only imports what a trace needs; "cold" starts with an empty cache,
"warm" asks the same again; "map" is a grid of 500 sizes, cold. `plan` and `--help` are timed three
times. All times are of whole processes, in seconds, start-up of Python included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CLI = [sys.executable, "-m", "lora_advisor.cli"]
IMPORTS = "import torch, peft, trl; from trl import SFTTrainer; from transformers import Trainer"
FIT = ["fit", "--gpu", "rtx-4060", "--vram", "8"]
QUESTIONS = {
    "qwen2.5-1.5b, 2048 tokens": [*FIT, "--model", "qwen2.5-1.5b", "--seq", "2048"],
    "qwen2.5-7b, 2048 tokens": [*FIT, "--model", "qwen2.5-7b", "--seq", "2048"],
}

PLAN = ["plan", "--vram", "8"]
TIMES = 3


def seconds(command: list[str], cache: str) -> float:
    started = time.perf_counter()
    environment = {**os.environ, "LORA_ADVISOR_CACHE": cache}
    subprocess.run(command, env=environment, capture_output=True, check=False)
    return round(time.perf_counter() - started, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fit_times.json"))
    arguments = parser.parse_args()
    report: dict[str, object] = {"cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as cache:
        seconds([sys.executable, "-c", IMPORTS], cache)  # files into the system's cache
        report["imports"] = seconds([sys.executable, "-c", IMPORTS], cache)
        report["--help"] = [seconds([*CLI, "--help"], cache) for _ in range(TIMES)]
    plans: dict[str, list[float]] = {"cold": [], "warm": []}
    for _ in range(TIMES):
        with tempfile.TemporaryDirectory() as cache:
            for kind in plans:
                plans[kind].append(seconds([*CLI, *PLAN, "--device", "none"], cache))
    report["plan --vram 8, no GPU"] = plans
    print(json.dumps(report), flush=True)
    for name, question in QUESTIONS.items():
        with tempfile.TemporaryDirectory() as cache:
            report[name] = {
                "cold": seconds([*CLI, *question, "--no-largest"], cache),
                "warm": seconds([*CLI, *question, "--no-largest"], cache),
            }
        with tempfile.TemporaryDirectory() as cache:
            report[f"{name}, with the largest sizes"] = {
                "cold": seconds([*CLI, *question], cache),
                "warm": seconds([*CLI, *question], cache),
            }
        with tempfile.TemporaryDirectory() as cache:
            report[f"{name}, map of 500"] = {
                "cold": seconds([*CLI, *question, "--map"], cache),
                "warm": seconds([*CLI, *question, "--map"], cache),
            }
        print(json.dumps(report), flush=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
