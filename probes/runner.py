"""Run one probe in a process of its own and write down how it ended.

A fresh process each time: CUDA keeps its context and its cache until exit, compiled code and
patched model classes stay too, and a probe that dies must not take the search with it. Every ending
is a `ProbeResult`, on disk before `run_probe` returns.

What is not covered: a parent killed with SIGKILL writes nothing; its child ends with it on Linux.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import FrameType

from lora_advisor.probes import unsloth
from lora_advisor.probes.architectures import Architecture
from lora_advisor.probes.child import run_child, worker_command
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import UsageError
from lora_advisor.probes.exchange import Answer, Request
from lora_advisor.probes.forkserver import ForkServer
from lora_advisor.probes.machine import GIB, Machine, Stack
from lora_advisor.probes.record import ProbeResult, append_record
from lora_advisor.probes.rivals import Rivals, nobody_to_see, others_on_gpu

#: A child that only makes a context answers within this time.
_CONTEXT_TIMEOUT_S = 120.0


def run_probe(
    config: RunConfig,
    architecture: Architecture,
    machine: Machine,
    stack: Stack,
    *,
    cap_bytes: int | None,
    record: Path | None,
    device: str,
    timeout_s: float = 600.0,
    warmup_steps: int = 3,
    measured_steps: int = 6,
    max_seconds: float = 20.0,
    allow_contention: bool = False,
    server: ForkServer | None = None,
) -> ProbeResult:
    """Run a few steps of a configuration in a child process.

    Args:
        config: What to run.
        architecture: The model's figures.
        machine: Where this is, for the record.
        stack: With what this is, for the record.
        cap_bytes: What the CUDA allocator may take, or how large the process on a CPU may be.
        record: File the result is appended to; None for none.
        device: "cuda" or "cpu".
        timeout_s: The child is killed after this time.
        warmup_steps: Steps before the measured ones, at least two.
        measured_steps: Steps to measure.
        max_seconds: Stop measuring after this time, once there are three steps.
        allow_contention: Run beside another process on the GPU and mark the result.
        server: Forks the child; without it, a process is started.

    Raises:
        BusyError: Another process uses the GPU, and contention is not allowed.
        UsageError: The request makes no sense.
    """
    request = Request(
        config=config,
        architecture=architecture,
        device=device,
        cap_bytes=cap_bytes,
        warmup_steps=warmup_steps,
        measured_steps=measured_steps,
        max_seconds=max_seconds,
        parent_pid=os.getpid(),
    )
    others = others_on_gpu if device == "cuda" else nobody_to_see
    rivals = Rivals(others, allowed=allow_contention)
    started_at = datetime.now(UTC).isoformat(timespec="seconds")

    def finish(answer: Answer) -> ProbeResult:
        result = _result(request, answer, machine, stack, rivals.seen, started_at)
        if record is not None:
            append_record(record, result)
        return result

    try:
        with _sigterm_raises():
            answer = run_child(request, timeout_s, rivals, server)
    except (KeyboardInterrupt, SystemExit):
        finish(Answer(outcome="interrupted", detail="stopped from outside before it ended"))
        raise
    return finish(answer)


def _result(
    request: Request,
    answer: Answer,
    machine: Machine,
    stack: Stack,
    contended: bool | None,
    started_at: str,
) -> ProbeResult:
    measured = {field.name: getattr(answer, field.name) for field in dataclasses.fields(answer)}
    return ProbeResult(
        config=request.config,
        architecture=request.architecture.fingerprint,
        hf_config=request.architecture.hf_config,
        machine=machine,
        stack=stack,
        cap_bytes=request.cap_bytes,
        contended=contended,
        started_at=started_at,
        engine=None if request.config.is_buildable else unsloth.engine(),
        **measured,
    )


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, so that the child is ended and the record written.

    Only where nobody else handles it, and only in the main thread, the one that may.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def capped_bytes(vram_bytes: int, context_bytes: int, reserve_bytes: int) -> int:
    """Return what is left for the allocator once the context and the reserve are taken off.

    Raises:
        UsageError: Nothing is left.
    """
    cap = vram_bytes - context_bytes - reserve_bytes
    if cap <= 0:
        raise UsageError(
            f"The memory must be more than the CUDA context and the reserve take, but "
            f"{vram_bytes / GIB:.2f} GiB less {context_bytes / GIB:.2f} GiB and "
            f"{reserve_bytes / GIB:.2f} GiB leaves nothing; give more memory or a smaller reserve."
        )
    return cap


@cache
def context_bytes_of(machine: Machine, server: ForkServer | None = None) -> int | None:
    """Return what a process holds on the GPU before its first tensor; None on a CPU or unknown."""
    if machine.kind != "cuda":
        return None
    if server is not None:
        answer = server.ask("context")
        if answer:
            return int(answer)
    try:
        done = subprocess.run(
            worker_command("--context"),
            capture_output=True,
            text=True,
            timeout=_CONTEXT_TIMEOUT_S,
            check=True,
        )
        return int(done.stdout)
    except (subprocess.SubprocessError, ValueError):
        return None
