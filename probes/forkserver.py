"""A process that has imported the libraries and forks a fresh one for each probe or trace.

Importing takes longer than a short probe: 7 s on a laptop's CPU, up to 29 s on a slow host. A fork
costs milliseconds and is as fresh as a new process: the server never touches a device, so each fork
makes its own CUDA context and takes it along when it ends. Where the server cannot be had (no fork,
or an import that makes a context), probes start a process of their own.

The server's protocol is a line of JSON each way: {"job", "request", "answer", "log"} in, {"pid"}
back when the fork runs and {"status"} when it has ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any, Self

from lora_advisor.probes import libraries, nvml
from lora_advisor.probes.architectures import Architecture
from lora_advisor.probes.errors import AdvisorError
from lora_advisor.probes.packed_models import attentions_of
from lora_advisor.probes.trace_batch import Batch, Made, read_traces, write_batch

_LOG = logging.getLogger(__name__)
#: linux/prctl.h
_PR_SET_CHILD_SUBREAPER = 36
#: Imports are given this long before probes go their own way.
_START_TIMEOUT_S = 180.0
_SERVE = (sys.executable, "-P", "-m", "lora_advisor.probes.forkserver")


class ForkServer:
    """The parent's side; a context manager, for the server ends with it."""

    @classmethod
    def of(cls, architecture: Architecture) -> Self:
        """Start the server for probes and traces of one architecture."""
        kind = architecture.hf_config.get("model_type")
        return cls(offline=architecture.weights is None, model_type=kind)

    def __init__(self, *, offline: bool, model_type: str | None = None) -> None:
        """Start the server; its imports go on while the caller does.

        Args:
            offline: Whether the hub is never asked: no probe loads weights from it.
            model_type: What transformers calls the architecture, to import that as well.
        """
        environment = dict(os.environ, TOKENIZERS_PARALLELISM="false")
        environment.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as NVML counts
        # Inductor's compile workers are forked as well. By default they come from one more process
        # that imports torch anew, beside the steps that are measured.
        environment.setdefault("TORCHINDUCTOR_WORKER_START", "fork")
        if offline:
            environment["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._buffer = b""
        self._end: Any = None
        if hasattr(os, "fork") and sys.platform == "linux":
            self._process = subprocess.Popen(
                [*_SERVE, str(os.getpid()), model_type or ""],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
            self._end = weakref.finalize(self, _end, self._process)

    def __enter__(self) -> Self:
        """Return the server."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the server."""
        self.close()

    def close(self) -> None:
        """End the server and, with it, a fork that still runs."""
        self._process = None
        if self._end is not None:
            self._end()

    def start(
        self, request_file: Path, answer_file: Path, log_file: Path, *, job: str = "probe"
    ) -> Fork | None:
        """Fork a worker; None where a process of its own must be started instead."""
        if self._process is None or not self._is_ready():
            return None
        files = {"request": request_file, "answer": answer_file, "log": log_file}
        message = {"job": job, **{name: str(path) for name, path in files.items()}}
        assert self._process.stdin is not None
        try:
            self._process.stdin.write((json.dumps(message) + "\n").encode())
            self._process.stdin.flush()
        except OSError:
            self.close()
            return None
        begun = self._read(_START_TIMEOUT_S)
        if begun is None:
            self.close()
            return None
        return Fork(self, int(begun["pid"]))

    def ask(self, job: str, question: bytes = b"") -> bytes | None:
        """Run a job; None where it gave no answer.

        Args:
            job: "context" for the bytes of a CUDA context, "attention" for that of an architecture.
            question: What the job needs: the pickled architecture.
        """
        with tempfile.TemporaryDirectory(prefix="lora-advisor-") as name:
            request, answer, log = (Path(name) / part for part in ("request", "answer", "log.txt"))
            request.write_bytes(question)
            fork = self.start(request, answer, log, job=job)
            if fork is None or fork.wait() != 0 or not answer.exists():
                return None
            return answer.read_bytes()

    def trace(self, batch: Batch) -> list[Made | AdvisorError] | None:
        """Trace a batch, several configurations at a time; None where that cannot be."""
        with tempfile.TemporaryDirectory(prefix="lora-advisor-") as name:
            request, answer, log = (Path(name) / part for part in ("batch", "traces", "log.txt"))
            write_batch(request, batch)
            fork = self.start(request, answer, log, job="trace")
            if fork is None:
                return None
            try:
                fork.wait()
            except BaseException:
                self.close()  # which ends the fork and its workers
                raise
            return read_traces(answer) if answer.exists() else None

    def _is_ready(self) -> bool:
        """Wait for the end of the imports; without a server afterwards, say no."""
        if not self._ready:
            first = self._read(_START_TIMEOUT_S)
            self._ready = first is not None and bool(first.get("ready"))
            if not self._ready:
                _LOG.info("no fork server: %s", first)
                self.close()
        return self._ready

    def _read(self, timeout_s: float) -> dict[str, Any] | None:
        """Return the next message; None when the time is over or the server is gone."""
        if self._process is None:
            return None
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([descriptor], [], [], left)[0]:
                return None
            data = os.read(descriptor, 65536)
            if not data:
                self.close()
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    @property
    def is_alive(self) -> bool:
        """Whether there is a server."""
        return self._process is not None


class Fork:
    """A forked worker, with as much of `subprocess.Popen` as a runner needs.

    Attributes:
        pid: Its process, the leader of a session of its own.
    """

    def __init__(self, server: ForkServer, pid: int) -> None:
        """Note a fork that runs."""
        self._server = server
        self._status: int | None = None
        self.pid = pid

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status, negative for a signal.

        Raises:
            subprocess.TimeoutExpired: It still runs.
        """
        if self._status is None:
            message = self._server._read(1e9 if timeout is None else timeout)
            if message is not None:
                self._status = int(message["status"])
            elif self._server.is_alive:
                raise subprocess.TimeoutExpired("probe", timeout or 0.0)
            else:
                self._status = -9  # a server that is gone took its forks along
        return self._status

    def poll(self) -> int | None:
        """Return the exit status; None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0.0)
        return None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def serve(parent_pid: int, model_type: str) -> int:
    """Import the libraries, then fork a worker for each line of stdin until it ends."""
    from lora_advisor.probes import worker

    worker.die_with_parent(parent_pid)
    # Orphans of a fork come to this process, which then sees them end.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # torch/cuda/__init__.py, is_available: with this it asks NVML, and not CUDA, which would not
    # survive a fork.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    libraries.import_all(model_type.replace("-", "_"))
    libraries.freeze()  # for all forks
    if _has_context():
        _tell({"ready": False, "why": "an import made a CUDA context"})
        return 1
    _tell({"ready": True})
    for line in sys.stdin:
        files = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os._exit(_work(files))
        _tell({"pid": pid})
        _, status = os.waitpid(pid, 0)
        _end_group(pid)
        _tell({"status": os.waitstatus_to_exitcode(status)})
    return 0


def _end_group(leader: int) -> None:
    """End what a fork started and left behind: compile workers hold on to its CUDA context."""
    with contextlib.suppress(OSError):
        os.killpg(leader, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-leader, 0)


def _work(files: dict[str, str]) -> int:
    """Be the worker of one request, in the fork."""
    from lora_advisor.probes import trace_batch, worker

    os.setsid()
    nvml.forget()  # the driver's library does not survive a fork
    log = os.open(files["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    try:
        request, answer = Path(files["request"]), Path(files["answer"])
        if files["job"] != "probe":
            worker.die_with_parent(os.getppid())
        if files["job"] == "trace":
            return trace_batch.answer_batch(request, answer)
        if files["job"] == "attention":
            answer.write_text(" ".join(attentions_of(pickle.loads(request.read_bytes()))), "ascii")
            return 0
        if files["job"] == "context":
            answer.write_text(str(worker.context_bytes() or ""), "ascii")
            return 0
        return worker.answer_file(request, answer, parent_pid=os.getppid())
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _tell(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _has_context() -> bool:
    import torch

    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call] # torch's own


if __name__ == "__main__":
    sys.exit(serve(int(sys.argv[1]), sys.argv[2]))
