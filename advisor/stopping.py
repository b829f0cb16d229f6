"""Stop when asked to: after a signal the running step ends, is saved, and no more follows."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from lora_advisor.advisor.processes import here
from lora_advisor.probes.errors import AdvisorError

#: The signals that ask for it, by the shell's exit code: 128 and the signal's number.
SIGNALS = {130: signal.SIGINT, 143: signal.SIGTERM}

#: A launcher passes on a signal that the terminal has sent to all already; within so many seconds
#: it is the same one.
_ECHO_S = 5.0


class Interrupted(AdvisorError):  # noqa: N818 # not an error: what was asked for
    """A training that was asked to stop; nothing is lost that a checkpoint holds.

    Attributes:
        exit_code: 130 for SIGINT, 143 for SIGTERM.
    """

    def __init__(self, message: str, number: int) -> None:
        """Take the sentence and the signal's number."""
        super().__init__(message)
        self.exit_code = 128 + number  # type: ignore[misc] # of this one


class Stopper:
    """Hears the signals. A second one ends the program at once, as if this were not here."""

    def __init__(self, say: Callable[[str], None]) -> None:
        """Take whom to tell that the signal was heard."""
        self._say = say
        self._before: dict[int, Any] = {}
        self.in_steps = False
        self.number: int | None = None
        self._heard_at: float | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to the signals, if this is the thread that gets them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        for number in SIGNALS.values():
            self._before[number] = signal.signal(number, self._heard)
        try:
            yield
        finally:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _heard(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self._heard_at is not None and now - self._heard_at < _ECHO_S:
            return
        if here().size == 1 or self._heard_at is not None:
            self._restore()
        if self._heard_at is not None:
            signal.raise_signal(number)  # the second one
        self.number, self._heard_at = number, now
        if not self.in_steps:
            raise self.interrupted(None)
        with contextlib.suppress(RuntimeError):  # the signal came while this was being written to
            self._say("stopping at the end of this step; once more to stop at once")

    def interrupted(self, step: int | None) -> Interrupted:
        """Return the error that says where it stands: `step` was saved, None for no step since."""
        number = self.number or signal.SIGINT
        where = (
            "the last checkpoint holds" if step is None else f"the checkpoint of step {step} holds"
        )
        return Interrupted(
            f"stopped by {signal.Signals(number).name}; {where} what was trained: the same "
            "command goes on from there.",
            number,
        )
