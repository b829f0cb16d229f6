"""Compare peft's adapter with the fused one from runs on a card, pair by pair.

    python benchmarks/fused_on_card.py [RECORDS.jsonl ...] [--out FILE]

A pair is two records of one file that differ in the adapter's code alone. Runs without a partner
are listed too. The records are those of measure_configurations.py, each file from one machine.
Writes results/fused_on_h100.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lora_advisor.advisor.arms import describe
from lora_advisor.probes.record import ProbeResult, read_records

RECORDINGS = Path("tests/recordings")
FILES = (
    RECORDINGS / "h100-adapters-2026-11-25.jsonl",
    RECORDINGS / "h100-compiled-adapters-2026-11-25.jsonl",
    RECORDINGS / "h100-contenders-2026-11-26.jsonl",
)


def figures(result: ProbeResult | None) -> dict[str, Any] | None:
    """Return what a run came to."""
    if result is None:
        return None
    speed = result.tokens_per_s
    return {
        "outcome": result.outcome,
        "tokens_per_s": None if speed is None else round(speed),
        "allocated_gib": _gib(result.allocated_bytes),
        "reserved_gib": _gib(result.reserved_bytes),
        "warmup_s": None if result.warmup_s is None else round(result.warmup_s, 1),
        "doubts": list(result.doubts),
    }


def _gib(value: int | None) -> float | None:
    return None if value is None else round(value / 2**30, 2)


def compare(file: Path) -> list[dict[str, Any]]:
    """Return the rows of one file."""
    results = {result.config: result for result in read_records(file)}
    rows = []
    plain = {"adapter": "peft", "recompute": "layer"}
    for config in dict.fromkeys(config.replace(**plain) for config in results):
        peft, fused = results.get(config), results.get(config.replace(adapter="fused"))
        row = {"config": describe(config), "peft": figures(peft), "fused": figures(fused)}
        if peft and fused and peft.tokens_per_s and fused.tokens_per_s:
            row["speedup"] = round(fused.tokens_per_s / peft.tokens_per_s, 3)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path, nargs="*", default=FILES)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fused_on_h100.json"))
    arguments = parser.parse_args()
    files = []
    for file in arguments.records:
        first = next(iter(read_records(file)))
        files.append(
            {
                "file": file.name,
                "gpu": first.machine.name,
                "stack": first.stack.to_json(),
                "date": first.started_at[:10],
                "rows": compare(file),
            }
        )
    arguments.out.write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")
    for file in files:
        for row in file["rows"]:
            print(row.get("speedup"), row["config"], row["peft"], row["fused"])


if __name__ == "__main__":
    main()
