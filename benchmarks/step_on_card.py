"""Time and profile the step of configurations on the GPU that is here, each in a fresh process.

    python benchmarks/step_on_card.py --out FILE.json '{"model": "llama-3.2-1b"}' '{}' ...
    python benchmarks/step_on_card.py --show FILE.json

A configuration is what it changes of `USUAL`. Three steps warm up, five are timed, one is profiled:
the device's time is the sum of its kernels', idle is when none ran. Random weights, full rows of
random tokens, segments that expand, the allocator capped at --cap GiB.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lora_advisor.probes.config import LoraShape, RunConfig

WARMUP, STEPS = 3, 5
USUAL: dict[str, Any] = {
    "model": "qwen2.5-1.5b", "trainer": "trl", "method": "lora", "micro_batch": 12,
    "accumulation": 2, "seq_len": 1024, "optimizer": "adamw_torch_fused", "precision": "bf16",
    "checkpointing": "full", "attention": "sdpa", "kernels": "none", "loss": "one_pass",
    "lora": LoraShape(r=16, alpha=32, dropout=0.0, targets="all-linear"), "adapter": "fused",
    "compile": "layers", "allocator": "expandable_segments",
}  # fmt: skip
#: A profiled event that is the device's.
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def step(config: RunConfig, cap_gib: float) -> dict[str, Any]:
    """Run one configuration in this process."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from transformers import PrinterCallback, TrainerCallback

    from lora_advisor.probes.architectures import resolve_architecture
    from lora_advisor.probes.collator import random_rows
    from lora_advisor.probes.finetune import Schedule, build_trainer, padding_tokenizer
    from lora_advisor.probes.weights import load_model

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gib * 2**30 / total))
    architecture = resolve_architecture(config.model)
    vocabulary = architecture.hf_config["vocab_size"]
    model = load_model(config, architecture, "cuda")
    profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == WARMUP + STEPS:
                profiler.start()
            torch.cuda.synchronize()
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            torch.cuda.synchronize()
            times.append(time.perf_counter() - self.began)

    documents = 2 if config.packing else 1  # as a probe's rows
    with tempfile.TemporaryDirectory() as name:
        trainer: Any = build_trainer(
            config, model,
            rows=random_rows(
                documents * config.micro_batch * config.accumulation,
                config.seq_len // documents, vocabulary,
            ),
            tokenizer=padding_tokenizer(vocabulary), device="cuda", callbacks=[Clock()],
            schedule=Schedule(max_steps=WARMUP + STEPS + 1, output_dir=name),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        profiler.stop()
        trace = Path(name) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text("utf-8"))["traceEvents"]
    took = statistics.median(times[WARMUP : WARMUP + STEPS])
    return {
        "tokens_per_s": round(config.tokens_per_step / took),
        "step_times_s": [round(seconds, 4) for seconds in times],
        "allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 3),
        **_on_device(events),
    }


def _on_device(events: list[dict[str, Any]]) -> dict[str, float]:
    """Return for how many milliseconds the device ran kernels, and for how many it waited."""
    spans = sorted((e["ts"], e["dur"]) for e in events if e.get("cat") in ON_DEVICE)
    idle, end = 0.0, spans[0][0]
    for start, length in spans:
        idle += max(0.0, start - end)
        end = max(end, start + length)
    busy = sum(length for _, length in spans)
    return {"device_ms": round(busy / 1000, 1), "idle_ms": round(idle / 1000, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="*", help="JSON: what a configuration changes.")
    parser.add_argument("--cap", type=float, default=7.4)
    parser.add_argument("--note", default="")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--show", type=Path)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.show is not None:
        show(arguments.show)
        return
    if arguments.one:
        changes = json.loads(arguments.configs[0])
        print("\n" + json.dumps(step(RunConfig(**{**USUAL, **changes}), arguments.cap)))
        return
    from lora_advisor.probes.machine import detect_machine, detect_stack

    runs = []
    for text in arguments.configs:
        done = subprocess.run(
            [sys.executable, __file__, "--one", "--cap", str(arguments.cap), text],
            env={**os.environ, "PYTORCH_ALLOC_CONF": "expandable_segments:True"},
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        lines = done.stdout.strip().splitlines()
        found = {"error": done.returncode} if done.returncode else json.loads(lines[-1])
        runs.append({"changes": json.loads(text), **found})
        print(runs[-1], flush=True)
        arguments.out.write_text(json.dumps({
            "date": time.strftime("%Y-%m-%d"), "note": arguments.note,
            "machine": detect_machine("cuda").to_json(), "stack": detect_stack().to_json(),
            "cap_gib": arguments.cap, "runs": runs,
        }, indent=1) + "\n", "utf-8")  # fmt: skip


def show(file: Path) -> None:
    """Print a file's runs as a table in Markdown."""
    from tabulate import tabulate

    rows = []
    for run in json.loads(file.read_text("utf-8"))["runs"]:
        changes = {**USUAL, **run["changes"]}
        what = [changes[key] for key in ("model", "method", "micro_batch", "checkpointing")]
        what += [
            changes.get("recompute", "layer"),
            changes.get("cuda_graph", "off"),
            changes["loss"],
        ]
        rows.append([*what, *(run.get(k) for k in ("tokens_per_s", "device_ms", "idle_ms"))])
    heads = ["model", "method", "rows", "checkpointing", "recompute", "CUDA graph", "loss"]
    heads += ["tokens/s", "device, ms", "idle, ms"]
    print(tabulate(rows, heads, tablefmt="pipe", intfmt=","))


if __name__ == "__main__":
    main()
