"""Compare traced memory with the Tesla T4 rows of the table of published measurements.

    python benchmarks/published_t4.py CSV [--out FILE]

CSV holds the rows of the family "fitcheck" and the tier "A" (fitcheck-llm 0.3.1, MIT, measured by
its scripts/measure.py). No GPU is used, and no figure of a row is used to predict it. The step is
traced as that script runs it, in three points: its function drops the outputs when it returns, it
repeats grouped keys and values before the attention, and it loads fp16 models on the host. Writes
results/published_t4.json and, beside it, a table in Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from transformers import TrainerCallback
from transformers.integrations import sdpa_attention

from lora_advisor.models.memory import MemoryModel, context_of
from lora_advisor.models.replayed import traced_memory
from lora_advisor.probes import finetune
from lora_advisor.probes.architectures import Architecture, bundled_names, load_bundled
from lora_advisor.probes.config import LoraShape, RunConfig
from lora_advisor.probes.events import Trace
from lora_advisor.probes.extend import trace_all_layers

CAPABILITY = "7.5"
KINDS = ("allocated", "reserved", "process")
#: Bars of the median absolute error, in percent.
BARS = {"allocated": 2.0, "process": 5.0}
#: Endings of hub ids that name a tuned version of a bundled model, whose figures are the same.
_TUNED = ("-instruct", "-chat-v1.0")
#: Columns that must say the same in every row, for what they stand for is assumed below.
_SAME = {
    "precision": "fp16",
    "adapter_dtype": "float32",
    "optimizer": "torch AdamW fp32 states",
    "loss_impl": "HF full logits CE",
    "grad_accum": "1",
    "grad_ckpt": "1",
    "extra_flags": "prepare_model_for_kbit_training; use_reentrant=False",
}
ASSUMPTIONS = (
    "prepare_model_for_kbit_training (the flag stands in every row) is applied to the quantised "
    "rows alone: an fp16 model has no k-bit weights, and the trainable weights alone are fp32.",
    "alpha is 64 and dropout 0; alpha changes no memory.",
    "Full rows, no attention mask, the default allocator (scripts/measure.py sets nothing).",
    "The outputs of a step die at its end, and grouped keys and values are repeated before SDPA, "
    "as in scripts/measure.py (`one_step`, `_install_gqa_sdpa_shim`).",
    "fp16 models are loaded on the host and moved to the card (`build_model`), 4-bit ones are "
    "loaded to the card.",
    "The stack is that of this machine (torch, transformers, peft), not the row's.",
    "CUDA context: 141 MiB, the figure of these rows themselves (models/memory.py).",
    "A tuned version (-Instruct, -Chat) has the figures of the bundled base model.",
)


def published(file: Path) -> list[dict[str, str]]:
    """Return the rows to compare with, as they stand in the table."""
    with file.open(encoding="utf-8", newline="") as lines:
        rows = [
            row
            for row in csv.DictReader(lines)
            if row["family"] == "fitcheck" and row["tier"] == "A"
        ]
    for row in rows:
        for name, value in _SAME.items():
            if row[name] != value:
                raise SystemExit(f"{row['row_id']}: {name} must be {value!r}: {row[name]!r}.")
    return rows


def architecture_of(hub_id: str) -> Architecture | None:
    """Return the bundled figures of a hub id; None if they are not bundled."""
    name = hub_id.split("/")[-1].lower()
    for ending in _TUNED:
        name = name.removesuffix(ending)
    return load_bundled(name) if name in bundled_names() else None


def config_of(row: dict[str, str]) -> RunConfig:
    """Return the configuration that a row describes."""
    quantised = row["method"] == "qlora"
    return RunConfig(
        model=row["model"],
        trainer="loop",
        method=row["method"],
        quant_type=row["quant"] if quantised else None,
        double_quant=row["double_quant"] == "True" if quantised else None,
        micro_batch=int(row["micro_batch"]),
        seq_len=int(row["seq_len"]),
        optimizer="adamw_torch",
        precision="fp16",
        checkpointing="full",
        attention=row["attention"].split()[0],
        kernels="none",
        loss="full",
        fp32_upcast=quantised,
        lora=LoraShape(
            r=int(row["rank"]), alpha=64, dropout=0.0, targets=tuple(row["targets"].split("+"))
        ),
        compile="off",
        allocator="default",
    )


@contextlib.contextmanager
def as_measured() -> Iterator[None]:
    """Run the loop as the script that measured the rows does."""
    loop = finetune._loop_trainer

    def dropping_loop() -> Any:
        class DroppingLoop(loop()):  # type: ignore[misc]
            """Drops the outputs at the end of a step, as a function does that returns."""

            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                self.add_callback(Drop(self))

        return DroppingLoop

    class Drop(TrainerCallback):
        """Drops a trainer's outputs."""

        def __init__(self, trainer: Any) -> None:
            self.trainer = trainer

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.trainer.kept_outputs = None

    with (
        mock.patch.object(finetune, "_loop_trainer", dropping_loop),
        mock.patch.object(sdpa_attention, "use_gqa_in_sdpa", lambda *_, **__: False),
    ):
        yield


def loaded_on_host(trace: Trace) -> Trace:
    """Return the trace of a model that was loaded on the host and then moved, tensor by tensor.

    A trace begins with the block that `from_pretrained` reserves where it loads to a GPU.
    """
    kept = trace.blocks != trace.blocks[0]
    columns = ("blocks", "sizes", "phases", "layers")
    return dataclasses.replace(trace, **{name: getattr(trace, name)[kept] for name in columns})


def compare(row: dict[str, str], config: RunConfig, architecture: Architecture) -> dict:
    """Predict a row and set it beside what was measured."""
    started = time.perf_counter()
    with as_measured():
        trace = trace_all_layers(config, architecture, capability=CAPABILITY)
    if config.method == "lora":
        trace = loaded_on_host(trace)
    traced = traced_memory(trace, expandable=False)
    memory = MemoryModel(CAPABILITY, context_of(CAPABILITY)).predict(traced, config)
    predicted = {
        "allocated": memory.allocated_bytes,
        "reserved": memory.reserved_bytes,
        "process": memory.process_bytes,
    }
    measured = {
        "allocated": float(row["alloc_gib"]),
        "reserved": float(row["reserved_gib"]),
        "process": float(row["process_gib"]),
    }
    return {
        "row": row["row_id"],
        "role": row["notes"].split("role=")[1].split(";")[0],
        "versions": row["versions"],
        "model": row["model"].split("/")[-1],
        "method": config.method,
        "attention": config.attention,
        "seq_len": config.seq_len,
        "micro_batch": config.micro_batch,
        "instant": memory.instant,
        "predicted_gib": {kind: round(value / 2**30, 3) for kind, value in predicted.items()},
        "measured_gib": measured,
        "error_percent": {
            kind: round(100 * (predicted[kind] / 2**30 / measured[kind] - 1), 2) for kind in KINDS
        },
        "trace_s": round(time.perf_counter() - started, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/published_t4.json"))
    arguments = parser.parse_args()
    rows, left_out = [], []
    for row in published(arguments.csv):
        architecture = architecture_of(row["model"])
        if architecture is None:
            left_out.append({"row": row["row_id"], "why": f"{row['model']} is not bundled"})
            continue
        rows.append(compare(row, config_of(row), architecture))
        print(line(rows[-1]), flush=True)
    result = {
        "capability": CAPABILITY,
        "assumptions": ASSUMPTIONS,
        "left_out": left_out,
        "summary": summary(rows),
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    arguments.out.with_suffix(".md").write_text(table(result), "utf-8")
    print(json.dumps(result["summary"], indent=1))


def line(row: dict) -> str:
    """Return one row for people."""
    errors = "  ".join(f"{kind} {row['error_percent'][kind]:+6.2f} %" for kind in KINDS)
    return (
        f"{row['row']}  {row['model']:<26}{row['method']:<6}{row['attention']:<6}"
        f"{row['seq_len']:>5} x {row['micro_batch']:<3}{errors}"
    )


def summary(rows: Sequence[dict]) -> dict:
    """Return the errors of all rows, of each role, and of each attention and method in it."""
    groups: dict[str, list[dict]] = {"all": list(rows)}
    for row in rows:
        for name in (
            f"role {row['role']}",
            f"{row['attention']}, {row['method']}",
            f"{row['attention']}, {row['method']}, role {row['role']}",
        ):
            groups.setdefault(name, []).append(row)
    result: dict = {name: errors_of(groups[name]) for name in sorted(groups)}
    result["bars_met"] = {
        kind: result["all"][kind]["median_abs_percent"] <= bar for kind, bar in BARS.items()
    }
    result["median_trace_s"] = statistics.median(row["trace_s"] for row in rows)
    return result


def errors_of(rows: Sequence[dict]) -> dict:
    """Return the number of rows and, for each kind of memory, the median and worst error."""
    result: dict = {"rows": len(rows)}
    for kind in KINDS:
        errors = [row["error_percent"][kind] for row in rows]
        result[kind] = {
            "median_abs_percent": round(statistics.median(map(abs, errors)), 2),
            "worst_percent": max(errors, key=abs),
        }
    return result


def table(result: dict) -> str:
    """Return the summary and the rows in Markdown."""
    text = [
        "# Traced memory against published measurements of a Tesla T4",
        "",
        "Written by `benchmarks/published_t4.py`. No GPU, nothing fitted. Errors in percent,",
        "predicted over measured: median of the absolute ones, and the worst.",
        "",
        "| rows | n | " + " | ".join(f"{kind} | worst" for kind in KINDS) + " |",
        "|---|" + "--:|" * (1 + 2 * len(KINDS)),
    ]
    for name, group in result["summary"].items():
        if isinstance(group, dict) and "rows" in group:
            cells = [
                f"{group[kind]['median_abs_percent']:.2f} | {group[kind]['worst_percent']:+.2f}"
                for kind in KINDS
            ]
            text.append(f"| {name} | {group['rows']} | " + " | ".join(cells) + " |")
    text += ["", "Assumed:", ""]
    text += [f"* {assumption}" for assumption in result["assumptions"]]
    text += [f"* Left out: {left['row']}, {left['why']}." for left in result["left_out"]]
    text += [
        "",
        "| row | model | method | attention | tokens | " + " | ".join(KINDS) + " |",
        "|---|---|---|---|--:|" + "--:|" * len(KINDS),
    ]
    for row in result["rows"]:
        cells = [f"{row['error_percent'][kind]:+.2f}" for kind in KINDS]
        text.append(
            f"| {row['row']} | {row['model']} | {row['method']} | {row['attention']} | "
            f"{row['micro_batch']} x {row['seq_len']} | " + " | ".join(cells) + " |"
        )
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    main()
