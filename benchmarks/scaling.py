"""Train a plan's steps on one and on several GPUs of this host; write results/scaling.json.

    HF_HUB_OFFLINE=1 python benchmarks/scaling.py --gpus 1,2 [--model qwen2.5-1.5b] [--seq 1024]
        [--method qlora] [--until 540]

Plans for the largest number of GPUs (or takes --plan), probes on one, then trains the plan's step,
of random weights and full rows of random tokens, on each number of GPUs: on fewer with as many
times the accumulation, so that every step has the same rows. Each GPU's allocator is held to a card
of --vram GiB, as the plan holds its probes. Written are tokens/s, memory, the scaling efficiency
(tokens/s of N against N times one's), and beside them what the plan predicted. --device cpu takes
processes for GPUs, with --plan.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lora_advisor.advisor.launched import launched, shared_config, take_own_card
from lora_advisor.probes.machine import detect_machine, detect_stack
from lora_advisor.probes.plan import Plan, read_plan

#: Steps whose rows are drawn; they come again and again.
_STEPS_OF_ROWS = 2


def work(request: dict[str, Any], answer: Path) -> None:
    """Train as one of several processes; the first writes what was measured."""
    launch, plan = launched(), read_plan(Path(request["plan"]))
    config = shared_config(plan.chosen.config, planned_for=plan.spec.gpus, processes=launch.size)
    if config.allocator == "expandable_segments" and request["device"] == "cuda":
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if request["device"] == "cuda":
        take_own_card(launch)
    from transformers import PrinterCallback, TrainerCallback, set_seed

    from lora_advisor.advisor.data_parallel import arrange
    from lora_advisor.advisor.processes import here, joined
    from lora_advisor.advisor.watch import Watch
    from lora_advisor.probes.collator import random_rows
    from lora_advisor.probes.finetune import Schedule, build_trainer, padding_tokenizer
    from lora_advisor.probes.meter import open_meter
    from lora_advisor.probes.weights import load_model

    architecture = plan.architecture
    step_rows = config.micro_batch * config.accumulation * launch.size
    vocabulary = architecture.hf_config["vocab_size"]
    rows = random_rows(step_rows * _STEPS_OF_ROWS, config.seq_len, vocabulary)
    until = time.monotonic() + request["seconds"]

    class Until(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            late = here().numbers(time.monotonic() > until)
            control.should_training_stop = control.should_training_stop or bool(late[0][0])

    with joined(launch, request["device"]):
        meter = open_meter(request["device"], plan.cap_bytes)
        set_seed(0)
        trainer = build_trainer(
            config, load_model(config, architecture, request["device"]), rows=rows,
            tokenizer=padding_tokenizer(vocabulary), device=request["device"],
            schedule=Schedule(max_steps=request["steps"], output_dir=str(answer.parent / "out")),
        )  # fmt: skip
        arrange(trainer, config, [config.seq_len] * len(rows), seed=0)
        watch = Watch(meter, progress=lambda _: None, saved=lambda *_: None, seconds_before=0.0)
        watch.attach(trainer)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(watch)
        trainer.add_callback(Until())
        trainer.train()
        measured = watch.measured()
        if here().is_first:
            answer.write_text(json.dumps(dataclasses.asdict(measured)), "utf-8")


def measure(plan: Path, gpus: int, arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Train on so many GPUs, each in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with TemporaryDirectory() as name:
        answer = Path(name) / "answer.json"
        request = {
            "plan": str(plan), "device": arguments.device, "steps": arguments.steps,
            "seconds": seconds,
        }  # fmt: skip
        environment = {
            **os.environ, "HF_HUB_OFFLINE": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(gpus),
            "LOCAL_WORLD_SIZE": str(gpus),
        }  # fmt: skip
        began, children = time.monotonic(), []
        logs = [Path(name) / f"{rank}.txt" for rank in range(gpus)]
        for rank, log in enumerate(logs):
            with log.open("w") as stream:
                children.append(
                    subprocess.Popen(
                        [sys.executable, "-W", "ignore", __file__, "--work", json.dumps(request),
                         name],
                        env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=stream, stderr=subprocess.STDOUT,
                    )
                )  # fmt: skip
        _wait(children, seconds + 180)
        said = "\n".join(log.read_text("utf-8")[-600:] for log in logs)
        if not answer.is_file():
            return {"gpus": gpus, "failed": said}
        measured = json.loads(answer.read_text("utf-8"))
    return {"gpus": gpus, "wall_s": round(time.monotonic() - began, 1), **measured}


def _wait(children: list[subprocess.Popen[bytes]], seconds: float) -> None:
    """Wait for all; where one fails or time is up, none is left."""
    end = time.monotonic() + seconds
    while any(child.poll() is None for child in children):
        if any(child.poll() for child in children) or time.monotonic() > end:
            time.sleep(2)  # the others say what they see
            break
        time.sleep(0.1)
    for child in children:
        child.kill()
        child.wait()


def make_plan(arguments: argparse.Namespace, gpus: int, out: Path) -> None:
    """Plan for so many GPUs, with probes on the first."""
    command = [
        sys.executable, "-m", "lora_advisor.cli", "plan", "--model", arguments.model, "--seq",
        arguments.seq, "--method", arguments.method, "--vram", arguments.vram, "--batch",
        arguments.batch, "--gpus", gpus, "--budget", f"{arguments.budget}s", "--trials", 0,
        "--device", arguments.device, "--out", out,
    ]  # fmt: skip
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)


def summary(plan: Plan, measured: list[dict[str, Any]], device: str) -> dict[str, Any]:
    """Return what was measured, with the efficiency, and what the plan predicted beside it."""
    ran = {one["gpus"]: one for one in measured if one.get("padded_tokens_per_s")}
    alone = ran.get(1)
    for gpus, one in ran.items():
        one["efficiency"] = (
            None
            if alone is None
            else one["padded_tokens_per_s"] / gpus / alone["padded_tokens_per_s"]
        )
    return {
        "machine": detect_machine(device).to_json(),
        "stack": detect_stack().to_json(),
        "model": plan.architecture.name,
        "each": plan.chosen.config.to_json(),
        "effective_batch": plan.spec.effective_batch,
        "cap_bytes": plan.cap_bytes,
        "one_card_share_tokens_per_s": plan.chosen.tokens_per_s,
        "one_card_share_evidence": plan.chosen.evidence,
        "predicted": None if plan.scaling is None else plan.scaling.to_json(),
        "measured": measured,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", default="1,2", help="Numbers of GPUs, such as 1,2.")
    parser.add_argument("--model", default="qwen2.5-1.5b")
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--method", default="qlora")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--vram", type=float, default=8.0)
    parser.add_argument("--budget", type=float, default=90.0, help="Seconds of probes.")
    parser.add_argument("--until", type=float, default=540.0, help="Start nothing after this.")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--plan", type=Path, default=None)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scaling.json"))
    arguments = parser.parse_args()
    began = time.monotonic()
    numbers = [int(text) for text in arguments.gpus.split(",")]
    with TemporaryDirectory() as name:
        file = arguments.plan or Path(name) / "plan.json"
        if arguments.plan is None:
            make_plan(arguments, max(numbers), file)
        plan, measured = read_plan(file), []  # type: Plan, list[dict[str, Any]]
        for at, gpus in enumerate(numbers):
            left = arguments.until - (time.monotonic() - began)
            if left < 30:
                print(f"no time for {gpus} GPUs", flush=True)
                break
            seconds = max(10.0, left / (len(numbers) - at) - 60)  # less what the start takes
            measured.append(measure(file, gpus, arguments, seconds))
            print(json.dumps(measured[-1]), flush=True)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(
                json.dumps(summary(plan, measured, arguments.device), indent=1) + "\n", "utf-8"
            )
    print(f"written to {arguments.out} after {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(json.loads(sys.argv[2]), Path(sys.argv[3]) / "answer.json")
    else:
        main()
