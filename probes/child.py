"""Start the child process of a probe, watch it, end it, and tell how it went."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from lora_advisor.probes import unsloth
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.exchange import Answer, Request
from lora_advisor.probes.forkserver import Fork, ForkServer
from lora_advisor.probes.rivals import Rivals

_LOG = logging.getLogger(__name__)

#: How often the resident size of a child on a CPU is looked at.
_CPU_POLL_S = 0.05
#: How often the processes on a GPU are looked at: seldom, for a question to the driver costs time.
_CUDA_POLL_S = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """How a child ended: by itself, or stopped by us.

    Attributes:
        status: Its exit status, negative for a signal; None if it was stopped.
        stopped: The outcome it was stopped for; None if it ended by itself.
        detail: Why it was stopped, for people.
        process_bytes: Its resident size then, where that was the reason.
    """

    status: int | None = None
    stopped: str | None = None
    detail: str | None = None
    process_bytes: int | None = None


Child = subprocess.Popen[bytes] | Fork


def run_child(
    request: Request, timeout_s: float, rivals: Rivals, server: ForkServer | None = None
) -> Answer:
    """Start the child, wait for it, and tell from its answer or its end how it went."""
    with tempfile.TemporaryDirectory(prefix="lora-advisor-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        request.write(folder / "request.json")
        log = folder / "log.txt"
        log.touch()  # a fork that is killed at once has not opened it
        files = folder / "request.json", folder / "answer.json", log
        child = _start(request.config, files, server)
        try:
            ending = _wait(child, request, timeout_s, rivals)
        finally:
            _kill(child)
        text = log.read_text("utf-8", errors="replace")
        _LOG.debug("probe %s: %s\n%s", child.pid, ending, text)
        return answer_of(ending, Answer.read(folder / "answer.json"), text, request)


def _start(of: RunConfig, files: tuple[Path, Path, Path], server: ForkServer | None) -> Child:
    """Fork the worker where there is a server, start a process where there is none.

    Another engine has a process of its own in any case: the server has imported our packages.
    """
    request, answer, log = files
    foreign = not of.is_buildable
    fork = None if server is None or foreign else server.start(request, answer, log)
    if fork is not None:
        return fork
    with log.open("wb") as output:
        return subprocess.Popen(
            worker_command(str(request), str(answer)),
            env=unsloth.environment() if foreign else None,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the parent, which then ends the child
        )


def worker_command(*arguments: str) -> list[str]:
    """Return the command that starts a worker."""
    # -P: a folder called "datasets" where the user stands must not hide the package of that name.
    return [sys.executable, "-P", "-m", "lora_advisor.probes.worker", *arguments]


def _wait(child: Child, request: Request, timeout_s: float, rivals: Rivals) -> Ending:
    """Wait for a child's end, its time limit or, on a CPU, its memory limit."""
    deadline = time.monotonic() + timeout_s
    on_cpu = request.device == "cpu"
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            return Ending(stopped="timed_out", detail=f"stopped after {timeout_s:g} s")
        with contextlib.suppress(subprocess.TimeoutExpired):
            interval = _CPU_POLL_S if on_cpu else _CUDA_POLL_S
            return Ending(status=child.wait(min(left, interval)))
        if not on_cpu:
            rivals.look()
        elif request.cap_bytes is not None:
            resident = _resident_bytes(child.pid)
            if resident > request.cap_bytes:
                return Ending(
                    stopped="out_of_memory",
                    detail=_over(resident, request.cap_bytes),
                    process_bytes=resident,
                )


def _over(resident_bytes: int, cap_bytes: int) -> str:
    return f"the process held {resident_bytes} bytes, the limit is {cap_bytes}"


def answer_of(ending: Ending, answer: Answer | None, log: str, request: Request) -> Answer:
    """Return the child's answer, or what its end says where it gave none."""
    if ending.stopped is not None:
        return Answer(
            outcome=ending.stopped, detail=ending.detail, process_bytes=ending.process_bytes
        )
    if answer is not None:
        peak, cap = answer.process_bytes, request.cap_bytes
        if request.device == "cpu" and peak is not None and cap is not None and peak > cap:
            # The peak fell between two looks.
            return Answer(outcome="out_of_memory", detail=_over(peak, cap), process_bytes=peak)
        return answer
    lines = [line for line in log.splitlines() if line.strip()]
    last = lines[-1].strip() if lines else "it said nothing"
    status = ending.status or 0
    if status < 0:
        name = signal.Signals(-status).name
        return Answer(outcome="failed", detail=f"the process was killed by {name}: {last}")
    # bitsandbytes prints CUDA's error and exits (csrc/ops.cuh, CUDA_CHECK_RETURN).
    outcome = "out_of_memory" if "out of memory" in last.lower() else "failed"
    return Answer(outcome=outcome, detail=f"the process ended with status {status}: {last}")


def _resident_bytes(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def _kill(child: Child) -> None:
    """End a child that still runs, with all that it started."""
    if child.poll() is not None:
        return
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(child.pid)
        family = [process, *process.children(recursive=True)]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # the child leads a session of its own, or soon will
    for process in family:
        with contextlib.suppress(psutil.Error):
            process.kill()
    child.wait()
