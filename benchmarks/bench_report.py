"""Make the report of a bench anew from its record, on a machine without its card.

    python benchmarks/bench_report.py RUNS.jsonl --out FOLDER --repeats N --sizes 1x512,2x2048

The record is what `lora-advisor bench` keeps in its folder; the records of two GPUs of one machine
may be put one after the other.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from lora_advisor.advisor.bench import Bench, assign
from lora_advisor.advisor.bench_design import make_design
from lora_advisor.advisor.bench_files import RECORD, write_files
from lora_advisor.advisor.bench_study import study_of
from lora_advisor.advisor.report_bench import answer_text
from lora_advisor.probes.architectures import resolve_architecture
from lora_advisor.probes.record import read_records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vram", type=float, default=None)
    for name in ("methods", "optimizers", "precisions", "sizes"):
        parser.add_argument(f"--{name}", default=None)
    arguments = parser.parse_args()
    results = read_records(arguments.record)
    first = results[0]

    def levels(given: str | None, found: list[str]) -> tuple[str, ...]:
        return tuple(given.split(",")) if given else tuple(dict.fromkeys(found))

    configs = [result.config for result in results]
    factors = {
        "method": levels(arguments.methods, [c.method for c in configs]),
        "optimizer": levels(arguments.optimizers, [c.optimizer for c in configs]),
        "precision": levels(arguments.precisions, [c.precision for c in configs]),
        "size": levels(arguments.sizes, [f"{c.micro_batch}x{c.seq_len}" for c in configs]),
    }
    design = make_design(
        first.config, factors, device=first.machine.kind, repeats=arguments.repeats, seed=0
    )
    bench = Bench(
        design=design,
        architecture=resolve_architecture(first.config.model),
        machine=first.machine,
        stack=first.stack,
        device=first.machine.kind,
        vram_bytes=None if arguments.vram is None else int(arguments.vram * 2**30),
        cap_bytes=first.cap_bytes or 0,
        runs=assign(design, results),
    )
    study = study_of(bench)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_files(study, arguments.out)
    kept = arguments.out / RECORD
    if kept.resolve() != arguments.record.resolve():
        shutil.copyfile(arguments.record, kept)
    print(answer_text(study))


if __name__ == "__main__":
    main()
