"""Measure configurations on the GPU that is here, one after the other, each in a fresh process.

    python benchmarks/measure_configurations.py CASES.jsonl --record RECORDS.jsonl [--until SECONDS]

A case is a RunConfig. The allocator is held to the card of --vram GiB less its context and the
reserve, as `plan` holds its probes. Cases that the record holds already are not run again, so a
measurement that was stopped goes on. --again N measures the N fastest of the record once more, in
turn, so that what is compared lies close in time.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from lora_advisor.probes.architectures import resolve_architecture
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.forkserver import ForkServer
from lora_advisor.probes.machine import GIB, detect_machine, detect_stack
from lora_advisor.probes.record import read_records
from lora_advisor.probes.runner import capped_bytes, context_bytes_of, run_probe


def fastest(record: Path, count: int, model: str, seq_len: int) -> list[RunConfig]:
    speeds: dict[RunConfig, float] = {}
    for result in read_records(record):
        if (result.config.model, result.config.seq_len) != (model, seq_len):
            continue
        if result.outcome == "ok" and result.tokens_per_s:
            speeds[result.config] = max(result.tokens_per_s, speeds.get(result.config, 0.0))
    return sorted(speeds, key=lambda config: -speeds[config])[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", type=Path)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--vram", type=float, default=8.0)
    parser.add_argument("--until", type=float, default=570.0, help="Start no case after this.")
    parser.add_argument("--again", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    began = time.monotonic()
    machine, stack = detect_machine("cuda"), detect_stack()
    cases = [
        RunConfig.from_json(json.loads(line))
        for line in arguments.cases.read_text("utf-8").splitlines()
    ]
    done = {result.config for result in read_records(arguments.record)}
    waiting = [config for config in cases if config not in done]
    if arguments.again:
        first = cases[0]
        waiting += fastest(arguments.record, arguments.again, first.model, first.seq_len)
    with ForkServer(offline=True) as server:
        context = context_bytes_of(machine, server) or 0
        cap = capped_bytes(int(arguments.vram * GIB), context, GIB // 4)
        for number, config in enumerate(waiting):
            if time.monotonic() - began > arguments.until:
                print(f"no time for {len(waiting) - number} of {len(waiting)}")
                return
            result = run_probe(
                config, resolve_architecture(config.model), machine, stack, cap_bytes=cap,
                record=arguments.record, device="cuda", warmup_steps=2,
                measured_steps=arguments.steps, max_seconds=10.0, timeout_s=120.0, server=server,
                allow_contention=True,
            )  # fmt: skip
            print(
                f"{time.monotonic() - began:.0f} s", number, config.model, config.seq_len,
                config.method, config.micro_batch, config.checkpointing, config.kernels,
                config.compile, config.optimizer, config.precision, config.allocator,
                result.outcome, round(result.tokens_per_s or 0), result.doubts, flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
