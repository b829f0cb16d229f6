"""Kill trainings at random moments and compare the weights; write results/kill_and_resume.json.

    python benchmarks/kill_and_resume.py [--kills 20] [--seed 0]

A tiny model with dropout is trained on a CPU with a checkpoint every few steps and an evaluation
between them. Each of `--kills` trainings is killed (SIGKILL) once, at a moment drawn uniformly from
its time, and started again; one more is killed so many times in a row. What is compared with the
training that nobody killed are the adapter's bytes, the hold-out's losses row by row, and every
evaluation on the way. Steps lost are those reported before a kill and made again after it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

TESTS = Path(__file__).resolve().parent.parent / "tests"

STEPS, SAVE_STEPS, EVAL_STEPS = 120, 5, 12

#: What a child runs; every step is reported, so that it is known how far a killed one had come.
CHILD = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(TESTS)!r})
import tiny_training, torch
import lora_advisor.advisor.watch
lora_advisor.advisor.watch.REPORT_S = 0.0
torch.set_num_threads(1)
model, output = Path(sys.argv[1]), Path(sys.argv[2])
tiny_training.run(
    tiny_training.config_of(model), model / "rows.jsonl", output,
    max_steps={STEPS}, save_steps={SAVE_STEPS}, eval_steps={EVAL_STEPS}, stop_on_overfit=False,
)
"""


def start(model: Path, output: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", CHILD, str(model), str(output)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(child: subprocess.Popen[str]) -> None:
    """Wait for a child to come to its end."""
    _, said = child.communicate(timeout=600)
    if child.returncode:
        raise SystemExit(f"the training failed:\n{said[-2000:]}")


def begun(child: subprocess.Popen[str], output: Path, lines: int) -> bool:
    """Wait for a child's first sign of life, as in `killed`; False if it has ended."""
    file = output / "progress.jsonl"
    while child.poll() is None:
        if (output / "state.json").is_file() and (lines == 0 or len(reported(file)) > lines):
            return True
        time.sleep(0.005)
    return False


def reported(file: Path) -> list[int]:
    """Return the steps that were reported, in order; a torn line is none."""
    return list(_steps(file)) if file.is_file() else []


def _steps(file: Path) -> Iterator[int]:
    for line in file.read_text("utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if entry["event"] == "progress":
            yield entry["step"]


def killed(model: Path, output: Path, *, after_s: float) -> int | None:
    """Start a training and kill it; return the last step it reported, None if it was quicker.

    Args:
        model: Folder of model and data.
        output: The run's folder; a training that was killed there goes on.
        after_s: Seconds from its first sign of life: the folder is opened, or, where it goes on,
            its first step is reported.
    """
    lines = len(reported(output / "progress.jsonl"))
    child = start(model, output)
    if begun(child, output, lines):
        try:
            child.communicate(timeout=after_s)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
    _, said = child.communicate()
    if (output / "result.json").is_file():
        return None
    if child.returncode != -signal.SIGKILL:
        raise SystemExit(f"the training failed:\n{said[-2000:]}")
    steps = reported(output / "progress.jsonl")
    return steps[-1] if len(steps) > lines else 0


def outcome(output: Path) -> dict[str, Any]:
    """Return what must be the same."""
    result = json.loads((output / "result.json").read_text("utf-8"))
    adapter = (output / "adapter" / "adapter_model.safetensors").read_bytes()
    names = ("steps", "eval_loss_before", "eval_loss_after", "evaluations", "likelihood", "known")
    same = {name: result[name] for name in names}
    if same["known"]:
        same["known"].pop("file")
    holdout = (output / "holdout.json").read_bytes()
    return {
        **same,
        "adapter_sha256": hashlib.sha256(adapter).hexdigest(),
        "holdout_sha256": hashlib.sha256(holdout).hexdigest(),
    }


def resumed_from(output: Path) -> int:
    return json.loads((output / "result.json").read_text("utf-8"))["resumed_from_step"] or 0


def one_kill(model: Path, output: Path, draw: random.Random, seconds: float) -> dict[str, Any]:
    """Kill a training once, and let it come to its end."""
    while True:
        after_s = draw.uniform(0.0, seconds)
        step = killed(model, output, after_s=after_s)
        if step is not None:
            break
        shutil.rmtree(output)
    finish(start(model, output))
    from_step = resumed_from(output)
    return {"at_step": step, "resumed_from": from_step, "steps_lost": max(0, step - from_step)}


def many_kills(model: Path, output: Path, draw: random.Random, count: int, seconds: float) -> int:
    """Kill a training again and again, and let it come to its end; return how often it was."""
    done = 0
    while done < count:
        if killed(model, output, after_s=draw.uniform(0.0, 2 * seconds / count)) is None:
            return done
        done += 1
    finish(start(model, output))
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kill_and_resume.json"))
    arguments = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    import tiny_model

    draw = random.Random(arguments.seed)
    with TemporaryDirectory() as name:
        model = Path(name) / "model"
        tiny_model.save_model(model)
        tiny_model.save_rows(model / "rows.jsonl")
        whole = Path(name) / "whole"
        child = start(model, whole)
        begun(child, whole, 0)
        began = time.monotonic()
        while child.poll() is None and not (whole / "result.json").is_file():
            time.sleep(0.005)
        seconds = time.monotonic() - began
        finish(child)
        expected = outcome(whole)
        trials = []
        for number in range(arguments.kills):
            output = Path(name) / f"killed-{number}"
            trial = one_kill(model, output, draw, seconds)
            trial["same"] = outcome(output) == expected
            trials.append(trial)
            print(number + 1, trial, flush=True)
        output = Path(name) / "again-and-again"
        times = many_kills(model, output, draw, arguments.kills, seconds)
        again = {"kills": times, "same": outcome(output) == expected}
    summary = {
        "steps": STEPS,
        "save_steps": SAVE_STEPS,
        "eval_steps": EVAL_STEPS,
        "unbroken_s": round(seconds, 1),
        "trainings_killed_once": len(trials),
        "of_them_the_same": sum(trial["same"] for trial in trials),
        "most_steps_lost": max(trial["steps_lost"] for trial in trials),
        "median_steps_lost": statistics.median(trial["steps_lost"] for trial in trials),
        "killed_again_and_again": again,
        "expected": expected,
        "trials": trials,
    }
    arguments.out.write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps({k: v for k, v in summary.items() if k not in ("trials", "expected")}))
    if not (again["same"] and all(trial["same"] for trial in trials)):
        raise SystemExit("a training that was killed came to other weights")


if __name__ == "__main__":
    main()
