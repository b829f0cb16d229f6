"""Where the time of a plan's step goes, and what share of the arithmetic limit it reaches.

    python benchmarks/profile_step.py --plan plan.json --out profile.json        on the card
    python benchmarks/profile_step.py --draw profile.json --out docs/step-profile.png

The step is the plan's own (`build_trainer`), on random weights and full rows, some steps of it
under PyTorch's profiler. A kernel belongs to what launched it; compiled layers recompute within
their backward programs, so the picture sets as much aside for that as their forward took: all but
the loss head, whose share of the matrix products is that of the weights it multiplies with. The
limit is that of matrix products alone: 4 N operations a token (forward, and the gradients of
activations, of N weights that are not trained), without recomputation, at the speed of a large bf16
product, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import tempfile
import time
from bisect import bisect_right
from collections import defaultdict
from pathlib import Path
from typing import Any

from lora_advisor.probes.machine import detect_machine, detect_stack
from lora_advisor.probes.plan import Plan, read_plan

#: What a kernel does, by its name, the first that matches.
KINDS = (
    ("4-bit weights read", r"dequant|kDequantize"),
    ("attention", r"flash|fmha|attention|sdpa|cudnn"),
    ("loss head", r"^_fold_kernel|^_forward_kernel|^_backward_kernel|cross_entropy|log_softmax"),
    ("matrix products", r"gemm|nvjet|cutlass|cublas|xmma|splitK|dot_kernel"),
    ("optimizer and clipping", r"multi_tensor|adam|optimizer|lpnorm"),
    ("pointwise, norms, copies", r""),
)
#: Kernels that are kept by name.
_LONGEST = 40
PHASES = ("forward", "backward", "optimizer", "else")
#: What a forward pass does outside its layers, which is not recomputed.
_OUTSIDE = ("loss head",)


def products_per_s() -> float:
    """Return the operations a second of a large bf16 product here."""
    import torch

    one = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    times = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        one @ one
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return float(2 * 8192**3 / statistics.median(times[2:]))


def measure(plan: Plan, out: Path) -> None:
    """Profile steps of the plan's choice on the card that is here."""
    config = plan.chosen.config
    if config.allocator == "expandable_segments":
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function
    from transformers import PrinterCallback, TrainerCallback

    from lora_advisor.probes.collator import random_rows
    from lora_advisor.probes.finetune import Schedule, build_trainer, padding_tokenizer
    from lora_advisor.probes.weights import load_model

    speed = products_per_s()
    if plan.cap_bytes is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, plan.cap_bytes / total))
    architecture = plan.architecture
    vocabulary = architecture.hf_config["vocab_size"]
    model = load_model(config, architecture, "cuda")
    weights = multiplied(model)
    warmup, steps, profiled = 4, 5, 3
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.mark = record_function("part:optimizer")
            self.mark.__enter__()

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.mark.__exit__(None, None, None)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == warmup + steps:
                profiler.start()
            torch.cuda.synchronize()
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            torch.cuda.synchronize()
            times.append(time.perf_counter() - self.began)

    profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
    with tempfile.TemporaryDirectory() as name:
        trainer: Any = build_trainer(
            config, model,
            rows=random_rows(config.micro_batch * config.accumulation, config.seq_len, vocabulary),
            tokenizer=padding_tokenizer(vocabulary), device="cuda", callbacks=[Clock()],
            schedule=Schedule(max_steps=warmup + steps + profiled, output_dir=name),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        _marked(trainer, "compute_loss", "forward")
        _marked(trainer.accelerator, "backward", "backward")
        trainer.train()
        profiler.stop()
        trace = Path(name) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        kernels, span, names = kernels_of(json.loads(trace.read_text("utf-8"))["traceEvents"])
    measured = statistics.median(times[warmup : warmup + steps])
    table = {p: {k: round(ms / profiled, 3) for k, ms in kernels[p].items()} for p in kernels}
    found = {
        "machine": detect_machine("cuda").to_json(),
        "stack": detect_stack().to_json(),
        "config": config.to_json(),
        "cap_bytes": plan.cap_bytes,
        "weights": weights,
        "products_per_s": speed,
        "step_ms": round(measured * 1000, 2),
        "profiled_step_ms": round(span / profiled, 2),
        "tokens_per_s": round(config.tokens_per_step / measured),
        "limit_tokens_per_s": round(speed / (4 * weights)),
        "device_ms": round(sum(sum(kinds.values()) for kinds in table.values()), 2),
        "kernels_ms": table,
        "longest_ms": {
            name: round(ms / profiled, 3)
            for name, ms in sorted(names.items(), key=lambda item: -item[1])[:_LONGEST]
        },
    }
    out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(json.dumps(found, indent=1))


def multiplied(model: Any) -> int:
    """Return the weights that a token is multiplied with: not those it is only looked up in."""
    looked_up = model.get_input_embeddings().weight
    tied = looked_up is model.get_output_embeddings().weight
    shapes = [
        p.shape if getattr(p, "quant_state", None) is None else p.quant_state.shape
        for p in model.parameters()
        if p is not looked_up or tied
    ]
    return sum(int(shape[0] * shape[1]) for shape in shapes if len(shape) == 2)


def _marked(owner: Any, name: str, mark: str) -> None:
    """Have a call leave its name in the profile."""
    from torch.profiler import record_function

    plain = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(f"part:{mark}"):
            return plain(*args, **kwargs)

    vars(owner)[name] = call


def kernels_of(
    events: list[dict[str, Any]],
) -> tuple[dict[str, dict[str, float]], float, dict[str, float]]:
    """Return milliseconds of kernels by phase and kind, from the first to the last, and by name."""
    marks: dict[str, list[tuple[float, float]]] = defaultdict(list)
    launched: dict[int, float] = {}
    kernels = []
    for event in events:
        kind, name = event.get("cat"), event.get("name", "")
        if kind == "user_annotation" and name.startswith("part:"):
            marks[name[5:]].append((event["ts"], event["ts"] + event["dur"]))
        elif kind in ("cuda_runtime", "cuda_driver"):
            launched[event["args"].get("correlation", -1)] = event["ts"]
        elif kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            kernels.append(event)
    for ranges in marks.values():
        ranges.sort()

    def inside(mark: str, at: float) -> bool:
        ranges = marks[mark]
        index = bisect_right(ranges, (at, float("inf"))) - 1
        return index >= 0 and at <= ranges[index][1]

    found: dict[str, dict[str, float]] = {phase: defaultdict(float) for phase in PHASES}
    names: dict[str, float] = defaultdict(float)
    for event in kernels:
        at = launched.get(event["args"].get("correlation", -1), event["ts"])
        phase = next((p for p in PHASES[:-1] if inside(p, at)), "else")
        kind = next(kind for kind, pattern in KINDS if re.search(pattern, event["name"], re.I))
        found[phase][kind] += event["dur"] / 1000
        names[f"{phase}: {kind}: {event['name'][:90]}"] += event["dur"] / 1000
    begin = min(event["ts"] for event in kernels)
    end = max(event["ts"] + event["dur"] for event in kernels)
    by_phase = {phase: dict(kinds) for phase, kinds in found.items()}
    return by_phase, (end - begin) / 1000, names


def with_recomputation(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the milliseconds with what is recomputed apart: as much as the layers' forward."""
    table = {phase: dict(found["kernels_ms"][phase]) for phase in PHASES}
    share = {"full": 1.0, "offload": 1.0, "every_2": 0.5, "every_4": 0.25}
    again = share.get(found["config"]["checkpointing"], 0.0)
    if not again:
        return table
    forward, backward = table["forward"], table["backward"]
    apart = {k: again * ms for k, ms in forward.items() if k not in _OUTSIDE}
    apart["matrix products"] *= _layers_share(found)
    left = {kind: ms - apart.get(kind, 0.0) for kind, ms in backward.items()}
    return {
        "forward": forward,
        "recomputation": apart,
        "backward": left,
        "optimizer": table["optimizer"],
        "else": table["else"],
    }


def _layers_share(found: dict[str, Any]) -> float:
    """Return the layers' share of the forward's products: a head in one pass multiplies twice."""
    from lora_advisor.probes.architectures import resolve_architecture

    config = found["config"]
    figures = resolve_architecture(config["model"]).hf_config
    head = figures["vocab_size"] * figures["hidden_size"]
    layers = found["weights"] - head
    return float(layers / (layers + head * (2 if config["loss"] == "one_pass" else 1)))


def draw(found: dict[str, Any], out: Path) -> None:
    """Draw what a step's time goes to, by what it is for and what does it."""
    from matplotlib.figure import Figure

    colours = ("#2f6f9f", "#e08a3c", "#5b9b6b", "#8d6bb0", "#b34d5a", "#8a8a8a")
    figure = Figure(figsize=(8.2, 4.0), layout="constrained")
    axes = figure.subplots()
    table = with_recomputation(found)
    phases = [p for p in table if sum(table[p].values()) > 0.005 * found["step_ms"]]
    idle = max(0.0, found["step_ms"] - found["device_ms"])
    labels = [*phases, "device waits"]
    left = [0.0] * len(phases)
    for (kind, _), colour in zip(KINDS, colours, strict=True):
        widths = [table[phase].get(kind, 0.0) for phase in phases]
        if sum(widths) > 0:
            axes.barh(range(len(phases)), widths, left=left, color=colour, label=kind, height=0.62)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.barh(len(phases), idle, color="#d9d9d9", height=0.62, label="no kernel runs")
    for at, value in enumerate([*left, idle]):
        share = 100 * value / found["step_ms"]
        axes.text(value, at, f"  {value:,.0f} ms, {share:.0f} %", va="center", fontsize=9)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, max([*left, idle]) * 1.22)
    axes.set_xlabel(f"ms of a step of {found['step_ms']:,.0f} ms")
    share = found["tokens_per_s"] / found["limit_tokens_per_s"]
    config = found["config"]
    axes.set_title(
        f"{config['model']}, {config['method']}, {config['micro_batch']} x {config['seq_len']}: "
        f"{found['tokens_per_s']:,} tokens/s,\n{share:.0%} of what the products alone would allow "
        f"({found['limit_tokens_per_s']:,})",
        fontsize=10,
        loc="left",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    figure.savefig(out, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", type=Path)
    parser.add_argument("--draw", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.draw is not None:
        draw(json.loads(arguments.draw.read_text("utf-8")), arguments.out)
    else:
        measure(read_plan(arguments.plan), arguments.out)


if __name__ == "__main__":
    main()
