"""Notice other processes on the GPU: a step that shares its device has no time of its own."""

from __future__ import annotations

import os
from collections.abc import Callable

from lora_advisor.probes import nvml
from lora_advisor.probes.errors import BusyError

#: Returns the ids of the other processes on the device; None where that is unknown.
Others = Callable[[], set[int] | None]


def others_on_gpu() -> set[int] | None:
    """Return the processes that hold a context on the GPU, this one left out."""
    found = nvml.other_processes(os.getpid())
    return None if found is None else {process.pid for process in found}


def nobody_to_see() -> None:
    """Return None: a CPU is always shared."""


class Rivals:
    """Watches for other processes on the device.

    Attributes:
        seen: Whether there was one so far; None where that is unknown.
    """

    def __init__(self, others: Others, *, allowed: bool) -> None:
        """Look before the start.

        Raises:
            BusyError: There is one, and it is not allowed.
        """
        self._others = others
        before = others()
        self._before = before or set()
        self.seen = None if before is None else bool(before)
        if self.seen and not allowed:
            pids = ", ".join(str(pid) for pid in sorted(self._before))
            raise BusyError(
                f"The GPU must be free while a probe is timed, but process {pids} uses it; "
                "stop it, or allow contention and take the times for what they are."
            )

    def look(self) -> None:
        """Note a process that came after the start, besides the child itself.

        Inside a container the child may be listed under a number that is not its own, so one
        newcomer is taken for it.
        """
        now = self._others()
        if now is not None and len(now - self._before) > 1:
            self.seen = True
