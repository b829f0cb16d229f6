"""Processes that train together, as a launcher starts them."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def start(words: Sequence[object], *, size: int = 2) -> list[subprocess.Popen[str]]:
    """Start `python WORDS` so many times, each told its number and where to meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", *map(str, words)],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "PYTHONPATH": str(TESTS),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": str(size),
                "LOCAL_WORLD_SIZE": str(size),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def finish(children: Sequence[subprocess.Popen[str]], *, timeout: float = 400.0) -> list[str]:
    """Wait for all; return what each said. None outlives this."""
    with contextlib.suppress(subprocess.TimeoutExpired):  # what they said tells more
        for child in children:
            child.wait(timeout)
    for child in children:
        child.terminate()  # a launcher ends its own
    with contextlib.suppress(subprocess.TimeoutExpired):
        for child in children:
            child.wait(45.0)
    for child in children:
        child.kill()
    return ["".join(child.communicate()) for child in children]
