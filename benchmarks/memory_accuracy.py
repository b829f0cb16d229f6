"""Compare traced memory, before and after five probes, with what an H100 measured.

    python benchmarks/memory_accuracy.py NAME=RECORDS.jsonl ... [--out FILE] [--cards 6,8,12,16]

RECORDS holds lines of `memory_on_card.py` (probe records), or lines with `config`, `hf_config`,
`cap_gib` and `measured`. No figure of a row is used to predict it; "after five probes" learns from
the first five rows of the file that ran, and is scored on the others. Rows of other engines are
left out. A verdict is asked for every card: the truth is the run in its memory, or, where there was
none to make, the uncapped peaks. Writes benchmarks/results/memory_accuracy.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_advisor.models.memory import MemoryModel, Observed, context_of
from lora_advisor.models.replayed import traced_memory
from lora_advisor.models.traced import TracedMemory
from lora_advisor.probes.architectures import from_hf_config
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.extend import trace_all_layers

CAPABILITY = "9.0"
PROBES = 5
#: A verdict is asked for where the smallest cap a run survives is farther from the cap than this.
EDGE = 0.03


def rows_of(file: Path) -> list[dict[str, Any]]:
    """Bring both kinds of line into one shape; rows that say nothing of memory are left out."""
    rows = []
    for number, line in enumerate(file.read_text("utf-8").splitlines()):
        data = json.loads(line)
        if "measured" in data:
            measured, cap = data["measured"], data["cap_gib"]
            outcome = {"ok": "ok", "oom": "out_of_memory"}.get(measured["status"], "failed")
            cap = None if cap is None else int(cap * 2**30)
        else:
            measured, cap, outcome = data, data["cap_bytes"], data["outcome"]
        if outcome not in ("ok", "out_of_memory"):
            continue
        rows.append(
            {
                "row": number,
                "config": data["config"],
                "hf_config": data["hf_config"],
                "cap": cap,
                "ok": outcome == "ok",
                "allocated": measured.get("allocated_bytes"),
                "reserved": measured.get("reserved_bytes"),
                "process": measured.get("process_bytes"),
                "context": measured.get("context_bytes"),
                "retries": measured.get("alloc_retries"),
                "loaded": measured.get("model_allocated_bytes"),
            }
        )
    return rows


def trace_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add what each row's trace comes to; a configuration that ran several times is traced once."""
    known: dict[str, tuple[TracedMemory, float]] = {}
    kept = []
    for row in rows:
        config = RunConfig.from_json(row["config"])
        if not config.is_buildable:
            continue
        key = json.dumps([row["config"], row["hf_config"]], sort_keys=True)
        if key not in known:
            started = time.perf_counter()
            trace = trace_all_layers(
                config, from_hf_config("row", row["hf_config"]), capability=CAPABILITY
            )
            expandable = config.allocator == "expandable_segments"
            traced = traced_memory(trace, expandable=expandable)
            known[key] = traced, time.perf_counter() - started
        row["traced"], row["seconds"] = known[key]
        row["run_config"] = config
        kept.append(row)
        print(row["row"], config.model, config.method, _errors(row), flush=True)
    return kept


def _errors(row: dict[str, Any]) -> dict[str, float | None]:
    traced: TracedMemory = row["traced"]
    if not row["ok"]:
        return {}
    return {
        "allocated_percent": _percent(traced.allocated_bytes, row["allocated"]),
        "reserved_percent": _percent(traced.reserved_bytes, row["reserved"]),
    }


def _percent(predicted: float, measured: float | None) -> float | None:
    return None if not measured else round(100 * (predicted / measured - 1), 3)


def spread(errors: Sequence[float]) -> dict[str, Any] | None:
    """Median of the sizes, the worst one, and how many."""
    if not errors:
        return None
    return {
        "runs": len(errors),
        "median_abs_percent": round(statistics.median(map(abs, errors)), 3),
        "worst_percent": round(max(errors, key=abs), 2),
    }


def score(rows: Sequence[dict[str, Any]], model: MemoryModel) -> dict[str, Any]:
    """Errors of a model on rows that ran; of reserve and process where no cache was given back."""
    ran = [row for row in rows if row["ok"]]
    free = [row for row in ran if row["cap"] is None or not row["retries"]]
    found: dict[str, list[float]] = {"allocated": [], "reserved": [], "process": []}
    for kind, errors in found.items():
        for row in ran if kind == "allocated" else free:
            memory = model.predict(row["traced"], row["run_config"])
            error = _percent(getattr(memory, f"{kind}_bytes"), row[kind])
            if error is not None:
                errors.append(error)
    result: dict[str, Any] = {kind: spread(errors) for kind, errors in found.items()}
    uppers = [
        row["process"] <= model.predict(row["traced"], row["run_config"]).process_upper_bytes
        for row in free
        if row["process"]
    ]
    if uppers:
        result["process within its bound"] = f"{sum(uppers)} of {len(uppers)}"
    return result


def observed(rows: Sequence[dict[str, Any]]) -> list[Observed]:
    """The first five rows that ran free of a cap, as probes."""
    ran = [row for row in rows if row["ok"] and row["cap"] is None][:PROBES]
    return [
        Observed(
            traced=row["traced"], allocated_bytes=row["allocated"], reserved_bytes=row["reserved"]
        )
        for row in ran
    ]


def verdicts(
    rows: Sequence[dict[str, Any]], model: MemoryModel, cards: Sequence[int]
) -> dict[str, Any]:
    """What the verdicts say against what happened, for capped rows and for each card."""
    asked: list[tuple[str, bool, bool]] = []  # verdict, ran, within 3 % of the edge
    runs: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        runs.setdefault(json.dumps([row["config"], row["hf_config"]]), []).append(row)
    context = model.context.value_bytes
    for group in runs.values():
        config, traced = group[0]["run_config"], group[0]["traced"]
        memory = model.predict(traced, config)
        capped = {row["cap"]: row["ok"] for row in group if row["cap"] is not None}
        free = next((row for row in group if row["cap"] is None and row["ok"]), None)
        own = free["context"] if free and free["context"] else context
        for cap in set(capped) | {card - own for card in cards}:
            ran = capped.get(cap)
            if ran is None and free is not None:
                ran = free["reserved"] <= cap
                if not ran and free["allocated"] <= cap:
                    continue  # only a run could have told
            if ran is None:
                if not any(not row["ok"] and row["cap"] is None for row in group):
                    continue
                ran = False  # it did not run on the whole card either
            near = abs(traced.needed_bytes / cap - 1) <= EDGE
            asked.append((model.verdict(config, memory, cap + context), ran, near))
    return {
        "asked": len(asked),
        "false fits": sum(verdict == "fits" and not ran for verdict, ran, _ in asked),
        "false does-not-fit": sum(verdict == "does not fit" and ran for verdict, ran, _ in asked),
        "uncertain": sum(verdict == "uncertain" for verdict, _, _ in asked),
        "uncertain more than 3 % from the edge": sum(
            verdict == "uncertain" and not near for verdict, _, near in asked
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", nargs="+", help="NAME=FILE")
    parser.add_argument("--cards", default="6,8,12,16", help="GiB, with commas.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/memory_accuracy.json"))
    arguments = parser.parse_args()
    cards = [int(float(card) * 2**30) for card in arguments.cards.split(",") if card]
    report: dict[str, Any] = {}
    for record in arguments.records:
        name, _, file = record.partition("=")
        rows = trace_rows(rows_of(Path(file)))
        traced = MemoryModel(CAPABILITY, context_of(CAPABILITY))
        probes = observed(rows)
        probed = MemoryModel.fit(CAPABILITY, context_of(CAPABILITY), probes)
        rest = [row for row in rows if row["traced"] not in [o.traced for o in probes]]
        report[name] = {
            "traced": score(rows, traced),
            "after five probes": score(rest, probed),
            "verdicts, traced": verdicts(rows, traced, cards),
            "verdicts, after five probes": verdicts(rest, probed, cards),
            "median_trace_s": round(statistics.median(row["seconds"] for row in rows), 2),
            "rows": [
                {
                    "row": row["row"],
                    "model": row["run_config"].model,
                    "trainer": row["run_config"].trainer,
                    "method": row["run_config"].method,
                    "checkpointing": row["run_config"].checkpointing,
                    "kernels": row["run_config"].kernels,
                    "compile": row["run_config"].compile,
                    "tokens": row["run_config"].tokens,
                    "cap": row["cap"],
                    "ran": row["ok"],
                    "retries": row["retries"],
                    **_errors(row),
                }
                for row in rows
            ],
        }
        print(name, json.dumps({k: v for k, v in report[name].items() if k != "rows"}, indent=1))
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
