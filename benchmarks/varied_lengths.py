"""Time steps on rows of a data set's lengths, padded to few lengths or to any.

    HF_HUB_OFFLINE=1 python benchmarks/varied_lengths.py [--plan PLAN.json] [--multiples 28,1]

The lengths are those of the plan's data, the step its choice's with other layers (compiled, Liger's
kernels, plain), the weights and tokens random: neither time nor memory depends on them. Each case
trains a while with micro-batches padded to a multiple of --multiples; one more is without cuDNN's
attention. Written are the tokens and useful tokens of all steps per second, and how many steps took
over twice the median.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

from lora_advisor.advisor.lengths import lengths_of
from lora_advisor.probes import finetune
from lora_advisor.probes.architectures import load_bundled
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.machine import detect_machine, detect_stack
from lora_advisor.probes.plan import read_plan

PLAN = Path("tests/recordings/plan-smollm2-135m-gsm8k-h100-2026-11-26.json")


def train(config: RunConfig, lengths: list[int], multiple: int, seconds: float) -> dict[str, Any]:
    """Train on rows of these lengths for a while; return what the steps took."""
    import torch
    from transformers import TrainerCallback

    from lora_advisor.probes import arguments
    from lora_advisor.probes.weights import load_model

    architecture = load_bundled(config.model)
    vocabulary = architecture.hf_config["vocab_size"]
    draw = random.Random(0)
    rows = []
    for length in lengths:
        ids = [draw.randrange(vocabulary) for _ in range(length)]
        rows.append({"input_ids": ids, "labels": ids})
    times: list[float] = []
    tokens: list[tuple[int, int]] = []
    until = time.monotonic() + seconds

    class Clock(TrainerCallback):
        """Times the steps."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            torch.cuda.synchronize()
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            torch.cuda.synchronize()
            times.append(time.perf_counter() - self.began)
            control.should_training_stop = time.monotonic() > until

    def asked(_: RunConfig) -> int:
        return multiple

    with (
        TemporaryDirectory() as name,
        mock.patch.object(arguments, "padding_multiple", asked),
        mock.patch.object(finetune, "padding_multiple", asked),
    ):
        trainer = finetune.build_trainer(
            config, load_model(config, architecture, "cuda"), rows=rows,
            tokenizer=finetune.padding_tokenizer(vocabulary), device="cuda",
            schedule=finetune.Schedule(max_steps=10_000, output_dir=name, shuffle=True),
            callbacks=[Clock()],
        )  # fmt: skip
        plain = trainer.training_step

        def counted(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            mask = inputs.get("attention_mask")
            every = inputs["input_ids"].numel()
            tokens.append((every, every if mask is None else int(mask.sum())))
            return plain(model, inputs, *args, **kwargs)

        vars(trainer)["training_step"] = counted
        trainer.train()
    del trainer
    gc.collect()
    torch.cuda.empty_cache()
    middle, spent = statistics.median(times), sum(times)
    steps = tokens[: len(times) * config.accumulation]
    return {
        "steps": len(times),
        "seconds": round(spent, 2),
        "tokens_per_s": round(sum(every for every, _ in steps) / spent),
        "useful_tokens_per_s": round(sum(useful for _, useful in steps) / spent),
        "padding": round(1 - sum(u for _, u in steps) / sum(e for e, _ in steps), 3),
        "median_step_s": round(middle, 4),
        "over_twice_the_median": sum(step > 2 * middle for step in times),
        "step_times_s": [round(step, 3) for step in times],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", type=Path, default=PLAN, help="Default: one for GSM8K.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--multiples", default="28,1")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/varied_lengths.json"))
    arguments = parser.parse_args()
    import torch

    plan = read_plan(arguments.plan)
    assert plan.data is not None
    config = plan.chosen.config.replace(model=arguments.model)
    lengths = [min(n, config.seq_len) for n in lengths_of(plan.data.length_counts, seed=0)]
    many = [int(multiple) for multiple in arguments.multiples.split(",")]
    layers = {
        "compiled": {"compile": "layers", "kernels": "none"},
        "liger": {"compile": "off", "kernels": "liger"},
    }
    cases = [("compiled", config.seq_len, True), *(("liger", m, True) for m in many)]
    cases.append(("liger", 1, False))
    found: dict[str, Any] = {
        "machine": detect_machine("cuda").to_json(),
        "stack": {k: v for k, v in detect_stack().to_json().items() if v},
        "config": config.to_json(),
        "cases": [],
    }
    for kind, multiple, cudnn in cases:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        case = {"layers": kind, "multiple": multiple, "cudnn_attention": cudnn}
        case |= train(config.replace(**layers[kind]), lengths, multiple, arguments.seconds)
        found["cases"].append(case)
        print(json.dumps(case), flush=True)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(found) + "\n", "utf-8")


if __name__ == "__main__":
    main()
