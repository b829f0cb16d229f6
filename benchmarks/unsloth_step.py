"""Measure Unsloth's training step; run by contenders.py, with a Python that finds Unsloth.

    python benchmarks/unsloth_step.py REQUEST.json ANSWER.jsonl

The request names a model's folder, the method, the micro-batches in the order they are tried, the
sequence length, the allocator's cap and the steps. Unsloth is used as its notebooks do: its
checkpointing, its kernels, optimizer adamw_8bit, full rows of random tokens. It ends at the first
micro-batch that does not fit.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PACKAGES = ("unsloth", "unsloth_zoo", "torch", "transformers", "trl", "peft", "bitsandbytes")


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    started = time.monotonic()
    from unsloth import FastLanguageModel  # isort: skip # it asks to be the first

    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, request["cap_bytes"] / total))
    began = time.monotonic()
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=request["model"],
        max_seq_length=request["seq_len"],
        dtype=torch.bfloat16,
        load_in_4bit=request["method"] == "qlora",
    )
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, lora_dropout=0, bias="none", target_modules=TARGETS,
        use_gradient_checkpointing=request["checkpointing"], random_state=0,
    )  # fmt: skip
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    now = time.monotonic()
    print(f"imported in {began - started:.0f} s, loaded in {now - began:.0f} s", flush=True)
    with Path(sys.argv[2]).open("a", encoding="utf-8") as answers:
        for micro_batch in request["micro_batches"]:
            answer = {"micro_batch": micro_batch, "versions": versions}
            try:
                answer.update(outcome="ok", **measure(model, tokenizer, micro_batch, request))
                answer["after_s"] = round(time.monotonic() - started)
            except torch.OutOfMemoryError as error:
                answer.update(outcome="oom", detail=str(error).splitlines()[0][:200])
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
            print(answer, flush=True)
            if answer["outcome"] != "ok":
                break
            gc.collect()
            torch.cuda.empty_cache()


def measure(
    model: Any, tokenizer: Any, micro_batch: int, request: dict[str, Any]
) -> dict[str, Any]:
    """Train a few steps; return their times and the allocator's peaks."""
    import numpy
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    warmup, steps = request["warmup_steps"], request["measured_steps"]
    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc] # transformers leaves it untyped
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            torch.cuda.synchronize()
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            torch.cuda.synchronize()
            times.append(time.perf_counter() - self.began)

    vocabulary = model.config.get_text_config().vocab_size
    shape = (micro_batch * (warmup + steps), request["seq_len"])
    rows = numpy.random.default_rng(0).integers(4, vocabulary, size=shape).tolist()
    torch.cuda.reset_peak_memory_stats()
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
        args=SFTConfig(
            output_dir=request["output_dir"], per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=1, max_steps=warmup + steps, learning_rate=2e-4,
            optim="adamw_8bit", bf16=True, max_length=request["seq_len"], packing=False,
            logging_steps=1000, save_strategy="no", report_to="none", seed=0, disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    return {
        "step_times_s": times[warmup:],
        "tokens_per_step": micro_batch * request["seq_len"],
        "allocated_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
    }


if __name__ == "__main__":
    main()
