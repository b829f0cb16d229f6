"""Run cases on the GPU that is here, a fresh process each, and record the memory each took.

    python benchmarks/memory_on_card.py CASES.jsonl --out RECORDS.jsonl [--events FOLDER]
        [--cards 6,8,12,16]

A case is a RunConfig, with `hf_config` beside its fields where the model is not a bundled one,
`cap_gib` to hold the allocator to a cap, `"stored": true` to load weights from a folder instead of
making them and, with --events, `"events": true` to keep every allocation and release of its
allocator. With --cards each case also runs in the memory of each such card (GiB, less context)
that its own peaks do not settle: live tensors within it, the reserve not. A record is a
ProbeResult. The libraries are imported once; each case runs in a fork of that process, which makes
its own CUDA context and ends with the case.
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
    import torch._inductor.compile_fx
    import trl
    from transformers import AutoModelForCausalLM, Trainer  # noqa: F401

    trl.SFTTrainer  # noqa: B018 - a lazy import
    torch.cuda.get_device_capability = asked
    if torch.cuda.is_initialized():
        sys.exit("an import made a CUDA context; forks of this process cannot use the GPU")


def case_of(line: str) -> tuple[RunConfig, Architecture, int | None, bool, bool]:
    data = json.loads(line)
    cap, events = data.pop("cap_gib", None), bool(data.pop("events", False))
    stored = bool(data.pop("stored", False))
    figures = data.pop("hf_config", None)
    config = RunConfig.from_json(data)
    architecture = (
        resolve_architecture(config.model)
        if figures is None
        else from_hf_config(config.model, figures)
    )
    return config, architecture, None if cap is None else int(cap * 2**30), events, stored


def store(architecture: Architecture, folder: Path) -> None:
    """Save random weights of an architecture, in bf16; runs in a process of its own."""
    import torch
    from transformers import AutoModelForCausalLM

    from lora_advisor.probes.architectures import build_hf_config

    torch.set_default_device("cuda")
    build: Any = AutoModelForCausalLM.from_config
    build(build_hf_config(architecture), dtype=torch.bfloat16).save_pretrained(folder)


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
    """Write [action, address, size] of every event of device 0, addresses from the lowest one."""
    import torch

    trace = torch.cuda.memory._snapshot()["device_traces"][0]
    events = [event for event in trace if event["action"] != "snapshot"]
    lowest = min(event["addr"] for event in events)
    lines = [(event["action"], event["addr"] - lowest, event["size"]) for event in events]
    with gzip.open(file, "wt") as out:
        json.dump(lines, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--events", type=Path, help="Folder for the allocators' events.")
    parser.add_argument("--cards", default="", help="GiB of cards, with commas.")
    parser.add_argument("--timeout", type=float, default=120.0, help="Seconds a case may take.")
    parser.add_argument("--until", type=float, default=570.0, help="Start no case after this.")
    arguments = parser.parse_args()
    began = time.monotonic()
    machine, stack = detect_machine("cuda"), detect_stack()
    import_everything()
    print(f"imports {time.monotonic() - began:.1f} s", flush=True)
    fork = multiprocessing.get_context("fork")
    cards = [int(float(card) * 2**30) for card in arguments.cards.split(",") if card]
    for number, line in enumerate(arguments.cases.read_text("utf-8").splitlines()):
        config, architecture, cap, events, stored = case_of(line)
        events_file = None
        if events and arguments.events is not None:
            arguments.events.mkdir(parents=True, exist_ok=True)
            events_file = arguments.events / f"{number:03d}.json.gz"
        with tempfile.TemporaryDirectory() as name:
            if stored:
                child = fork.Process(target=store, args=(architecture, Path(name)))
                child.start()
                child.join()
                architecture = dataclasses.replace(architecture, weights=name)
            waiting: list[int | None] = [cap]
            while waiting:
                if time.monotonic() - began > arguments.until:
                    print(f"no time for case {number} and those after it")
                    return
                cap = waiting.pop(0)
                request = Request(
                    config=config, architecture=architecture, device="cuda", cap_bytes=cap,
                    warmup_steps=2, measured_steps=2,
                )  # fmt: skip
                answer = answer_of(fork, request, arguments.timeout, events_file)
                result = ProbeResult(
                    config=config, architecture=architecture.fingerprint,
                    hf_config=architecture.hf_config, machine=machine, stack=stack, cap_bytes=cap,
                    started_at=datetime.now(UTC).isoformat(timespec="seconds"),
                    **{f.name: getattr(answer, f.name) for f in dataclasses.fields(answer)},
                )  # fmt: skip
                append_record(arguments.out, result)
                print(
                    number, config.model, config.method, config.trainer, config.tokens, cap,
                    result.outcome, result.detail or "", result.allocated_bytes,
                    result.reserved_bytes, result.context_bytes, result.attention_backend,
                    f"{time.monotonic() - began:.0f} s", flush=True,
                )  # fmt: skip
                if cap is None and result.outcome == "ok":
                    waiting += [c for c in unsettled(result, cards) if c]


def answer_of(fork: Any, request: Request, timeout: float, events_file: Path | None) -> Answer:
    """Answer a request in a fork of this process."""
    with tempfile.TemporaryDirectory() as folder:
        answer_file = Path(folder) / "answer.json"
        child = fork.Process(target=run, args=(request, answer_file, events_file))
        child.start()
        child.join(timeout)
        if child.is_alive():
            child.kill()
            child.join()
            return Answer(outcome="timed_out", detail=f"stopped after {timeout:g} s")
        return Answer.read(answer_file) or Answer(outcome="failed", detail="no answer")


def unsettled(result: ProbeResult, cards: list[int]) -> list[int]:
    """Return the caps of those cards of which only a run tells whether this configuration fits."""
    context = result.context_bytes or 0
    allocated, reserved = result.allocated_bytes or 0, result.reserved_bytes or 0
    return [card - context for card in cards if allocated <= card - context < reserved]


if __name__ == "__main__":
    main()
