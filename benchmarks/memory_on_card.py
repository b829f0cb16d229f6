"""Run cases on the GPU that is here, a fresh process each, and record the memory each took.

    python benchmarks/memory_on_card.py CASES.jsonl --out RECORDS.jsonl [--events FOLDER]

A case is a RunConfig, with `hf_config` beside its fields where the model is not a bundled one,
`cap_gib` to hold the allocator to a cap and, with --events, `"events": true` to keep every
allocation and release of its allocator. A record is a ProbeResult. The libraries are imported once;
each case runs in a fork of that process, which makes its own CUDA context and ends with the case.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_advisor.probes import worker
from lora_advisor.probes.architectures import Architecture, from_hf_config, resolve_architecture
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.exchange import Answer, Request
from lora_advisor.probes.machine import detect_machine, detect_stack
from lora_advisor.probes.record import ProbeResult, append_record


def import_everything() -> None:
    """Import what a probe imports, without creating a CUDA context in this process."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import torch

    asked = torch.cuda.get_device_capability
    torch.cuda.get_device_capability = lambda *_: (9, 0)  # bitsandbytes asks at import
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch._dynamo
    import torch._inductor.compile_fx  # noqa: F401
    import trl
    from transformers import AutoModelForCausalLM, Trainer  # noqa: F401

    trl.SFTTrainer  # noqa: B018 - a lazy import
    torch.cuda.get_device_capability = asked
    if torch.cuda.is_initialized():
        sys.exit("an import made a CUDA context; forks of this process cannot use the GPU")


def case_of(line: str) -> tuple[RunConfig, Architecture, int | None, bool]:
    data = json.loads(line)
    cap, events = data.pop("cap_gib", None), bool(data.pop("events", False))
    figures = data.pop("hf_config", None)
    config = RunConfig.from_json(data)
    architecture = (
        resolve_architecture(config.model)
        if figures is None
        else from_hf_config(config.model, figures)
    )
    return config, architecture, None if cap is None else int(cap * 2**30), events


def run(request: Request, answer_file: Path, events_file: Path | None) -> None:
    """Answer a request in this process, a fork; with `events_file`, keep the allocator's events."""
    try:
        worker.set_environment(request)
        if events_file is not None:
            opened = worker.open_meter

            def open_and_record(*args: Any) -> Any:
                meter = opened(*args)
                import torch

                torch.cuda.memory._record_memory_history(
                    max_entries=2_000_000, context=None, stacks="python"
                )
                return meter

            worker.open_meter = open_and_record  # type: ignore[assignment]
        answer = worker.answer(request, output_dir=answer_file.parent / "trainer")
        if events_file is not None:
            write_events(events_file)
        answer.write(answer_file)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def write_events(file: Path) -> None:
    """Write [action, address, size] of every event of device 0, addresses numbered as they come."""
    import torch

    trace = torch.cuda.memory._snapshot()["device_traces"][0]
    numbers: dict[int, int] = {}
    lines = [
        (event["action"], numbers.setdefault(event["addr"], len(numbers)), event["size"])
        for event in trace
        if event["action"] != "snapshot"
    ]
    with gzip.open(file, "wt") as out:
        json.dump(lines, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--events", type=Path, help="Folder for the allocators' events.")
    parser.add_argument("--timeout", type=float, default=120.0, help="Seconds a case may take.")
    parser.add_argument("--until", type=float, default=570.0, help="Start no case after this.")
    arguments = parser.parse_args()
    began = time.monotonic()
    machine, stack = detect_machine("cuda"), detect_stack()
    import_everything()
    print(f"imports {time.monotonic() - began:.1f} s", flush=True)
    fork = multiprocessing.get_context("fork")
    for number, line in enumerate(arguments.cases.read_text("utf-8").splitlines()):
        if time.monotonic() - began > arguments.until:
            print(f"no time for case {number} and those after it")
            break
        config, architecture, cap, events = case_of(line)
        request = Request(
            config=config, architecture=architecture, device="cuda", cap_bytes=cap,
            warmup_steps=2, measured_steps=2,
        )  # fmt: skip
        events_file = None
        if events and arguments.events is not None:
            arguments.events.mkdir(parents=True, exist_ok=True)
            events_file = arguments.events / f"{number:03d}.json.gz"
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            answer_file = Path(folder) / "answer.json"
            child = fork.Process(target=run, args=(request, answer_file, events_file))
            child.start()
            child.join(arguments.timeout)
            if child.is_alive():
                child.kill()
                child.join()
            answer = Answer.read(answer_file) or Answer(outcome="failed", detail="no answer")
        result = ProbeResult(
            config=config, architecture=architecture.fingerprint,
            hf_config=architecture.hf_config, machine=machine, stack=stack, cap_bytes=cap,
            started_at=datetime.now(UTC).isoformat(timespec="seconds"),
            **{field.name: getattr(answer, field.name) for field in dataclasses.fields(answer)},
        )  # fmt: skip
        append_record(arguments.out, result)
        print(
            number, config.model, config.method, config.trainer, config.tokens, result.outcome,
            result.detail or "", result.allocated_bytes, result.reserved_bytes,
            result.context_bytes, result.attention_backend,
            f"{time.monotonic() - started:.1f} s", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
