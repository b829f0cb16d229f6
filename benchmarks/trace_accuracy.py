"""Compare traced memory with what an H100 measured, and write results/trace_accuracy.json.

    python benchmarks/trace_accuracy.py RECORDS.jsonl [--rows N,N] [--out FILE]

Each line of RECORDS holds `config`, `hf_config`, `cap_gib` and `measured`; or is a probe record of
this project. No figure of a row is used to predict it. Rows of other engines are left out. Times
are those of one trace on this machine after imports.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from lora_advisor.models.allocator import replay
from lora_advisor.models.memory import MemoryModel, context_of, device_events, traced_memory
from lora_advisor.probes.architectures import from_hf_config
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.extend import trace_all_layers

CAPABILITY = "9.0"


def row_of(data: dict) -> dict | None:
    """Bring both kinds of line into one shape; None for a row that has no memory figure."""
    if "measured" in data:
        measured = data["measured"]
        cap = data["cap_gib"]
        return {
            "config": data["config"],
            "hf_config": data["hf_config"],
            "cap": None if cap is None else int(cap * 2**30),
            "ok": measured["status"] == "ok",
            "allocated": measured.get("allocated_bytes"),
            "reserved": measured.get("reserved_bytes"),
            "retries": measured.get("alloc_retries"),
        }
    if data["outcome"] not in ("ok", "out_of_memory"):
        return None
    return {
        "config": data["config"],
        "hf_config": data["hf_config"],
        "cap": data["cap_bytes"],
        "ok": data["outcome"] == "ok",
        "allocated": data["allocated_bytes"],
        "reserved": data["reserved_bytes"],
        "retries": data["alloc_retries"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path)
    parser.add_argument("--rows", default="")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/trace_accuracy.json"))
    arguments = parser.parse_args()
    wanted = {int(number) for number in arguments.rows.split(",") if number}
    model = MemoryModel(CAPABILITY, context_of(CAPABILITY))
    rows = []
    for number, line in enumerate(arguments.records.read_text("utf-8").splitlines()):
        row = row_of(json.loads(line))
        if row is None or (wanted and number not in wanted):
            continue
        config = RunConfig.from_json(row["config"])
        if not config.is_buildable:
            continue
        started = time.perf_counter()
        trace = trace_all_layers(config, from_hf_config("row", row["hf_config"]))
        seconds = time.perf_counter() - started
        expandable = config.allocator == "expandable_segments"
        traced = traced_memory(trace, CAPABILITY, expandable=expandable, ample_bytes=0)
        memory = model.predict(traced, config)
        survived = None
        if row["cap"] is not None:
            events = device_events(trace, CAPABILITY)
            survived = replay(events, cap_bytes=row["cap"], expandable=expandable).survived
        rows.append(
            {
                "row": number,
                "trainer": config.trainer,
                "method": config.method,
                "checkpointing": config.checkpointing,
                "kernels": config.kernels,
                "compile": config.compile,
                "tokens": config.tokens,
                "ran": row["ok"],
                "traced_allocated": memory.allocated_bytes,
                "traced_reserved": memory.reserved_bytes,
                "measured_allocated": row["allocated"] if row["ok"] else None,
                "measured_reserved": row["reserved"] if row["ok"] else None,
                "retries": row["retries"],
                "survives_cap": survived,
                "verdict": None
                if row["cap"] is None
                else model.verdict(config, memory, row["cap"] + model.context.value_bytes),
                "trace_s": round(seconds, 2),
            }
        )
        print(rows[-1], flush=True)
    arguments.out.write_text(json.dumps({"summary": summary(rows), "rows": rows}, indent=1) + "\n")
    print(json.dumps(summary(rows), indent=1))


def summary(rows: list[dict]) -> dict:
    """Median and worst relative errors, and how the verdicts under a cap stand to what happened."""
    result: dict = {"rows": len(rows)}
    for group in ("all", "off", "full"):
        for kind in ("allocated", "reserved"):
            errors = [
                row[f"traced_{kind}"] / row[f"measured_{kind}"] - 1
                for row in rows
                if row[f"measured_{kind}"]
                and (group == "all" or row["checkpointing"] == group)
                # A capped run that gave back its cache reserves less than an uncapped one would.
                and (kind == "allocated" or not row["retries"])
            ]
            if errors:
                result[f"{kind}, checkpointing {group}"] = {
                    "runs": len(errors),
                    "median_abs_percent": round(100 * statistics.median(map(abs, errors)), 3),
                    "worst_percent": round(100 * max(errors, key=abs), 2),
                }
                if kind == "reserved" and group == "all":
                    under = sorted(1 / (1 + error) - 1 for error in errors)
                    result["reserved_upper"] = round(under[int(0.95 * (len(under) - 1))], 4)
    capped = [row for row in rows if row["verdict"] is not None]
    result["verdicts"] = {
        "false fits": sum(row["verdict"] == "fits" and not row["ran"] for row in capped),
        "false does-not-fit": sum(
            row["verdict"] == "does not fit" and row["ran"] for row in capped
        ),
        "uncertain": sum(row["verdict"] == "uncertain" for row in capped),
        "capped runs": len(capped),
    }
    result["median_trace_s"] = statistics.median(row["trace_s"] for row in rows)
    return result


if __name__ == "__main__":
    main()
