"""The processes that train together, and what they agree on beside gradients.

All that is said here goes over gloo between hosts' memories, never over the cards: it waits for
nobody's kernels, and a process that ends is noticed at once by those that wait for it. Alone, every
function is the plain thing.

The rule that keeps it from hanging: what one process does, all do, in the same order. What may fail
in one of them stands in `together`, after which all know.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from lora_advisor.advisor.launched import Launch
from lora_advisor.probes.errors import AdvisorError

T = TypeVar("T")

#: A process may be alone for long, as when it answers samples; that one has ended is noticed
#: without this.
_PATIENCE = timedelta(days=2)

#: What gloo says when the process at the other end has gone (gloo/transport/tcp/pair.cc).
_GONE_WORDS = ("connection closed by peer", "connection reset by peer", "broken pipe", "gloo")


class PeerError(AdvisorError):
    """Another process of the same training has ended it; what a checkpoint holds is kept."""

    exit_code = 71


class GoneError(PeerError):
    """Another process has ended without a word."""


class MemoryElsewhere(RuntimeError):  # noqa: N818 # read as "out of memory", which it says
    """Memory ran out in another process, and all know."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Those that train together, as one of them sees them.

    Attributes:
        rank: Its own number.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1
    _group: Any = field(default=None, repr=False, compare=False)

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def each(self, value: T) -> list[T]:
        """Return every process's value, by its number."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        with _noticing_the_end():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def numbers(self, *values: float) -> list[list[float]]:
        """Return every process's numbers, by its number: a fraction of a millisecond."""
        if self.size == 1:
            return [list(values)]
        import torch
        import torch.distributed as dist

        mine = torch.tensor(values, dtype=torch.float64)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with _noticing_the_end():
            dist.all_gather(found, mine, group=self._group)
        return [tensor.tolist() for tensor in found]

    def sums(self, *values: float) -> list[float]:
        """Return the sums over all processes."""
        return [sum(column) for column in zip(*self.numbers(*values), strict=True)]

    def mean_lists(self, values: Sequence[float]) -> list[float]:
        """Return the means over all processes of lists that are equally long."""
        if self.size == 1 or not values:
            return list(values)
        return [total / self.size for total in self.sums(*values)]

    def together(self, action: Callable[[], T]) -> T:
        """Do something that may fail in any of them; then all fail.

        An error that all know carries `agreed`.
        """
        if self.size == 1:
            return action()
        error: Exception | None = None
        outcome: Any = None
        try:
            outcome = action()
        except GoneError:
            raise  # the others cannot be asked any more
        except Exception as raised:
            error = raised
        failures = self.each(None if error is None else _Failure.of(error))
        if error is not None:
            raise known_to_all(error)
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise failure.elsewhere(rank, self.size)
        return outcome  # type: ignore[no-any-return]

    def first(self, action: Callable[[], T]) -> T:
        """Let the first process do something, and return to all what came of it."""
        if self.size == 1:
            return action()
        done = self.together(lambda: action() if self.is_first else None)
        return self.each(done)[0]  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Failure:
    """What the others must know of an error."""

    message: str
    exit_code: int
    recoverable: bool

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        from lora_advisor.advisor.recovery import is_recoverable

        return cls(
            message=f"{error}" if isinstance(error, AdvisorError) else _first_line(error),
            exit_code=getattr(error, "exit_code", AdvisorError.exit_code),
            recoverable=not isinstance(error, AdvisorError) and is_recoverable(error),
        )

    def elsewhere(self, rank: int, size: int) -> Exception:
        """Return the error for the processes in which it did not happen."""
        error: Exception
        if self.recoverable:
            error = MemoryElsewhere(f"out of memory in process {rank} of {size}")
        else:
            error = PeerError(self.message)
            error.exit_code = self.exit_code  # type: ignore[misc] # of this one
        return known_to_all(error)


def known_to_all(error: Exception) -> Exception:
    """Note that all processes raise an error, or know of it; return it."""
    vars(error)["agreed"] = True
    return error


def is_agreed(error: BaseException) -> bool:
    """Whether all processes raise it, or know of it."""
    return bool(vars(error).get("agreed"))


def is_gone(error: BaseException) -> bool:
    """Whether an error says that another process has ended."""
    import torch.distributed as dist

    if isinstance(error, GoneError | dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(
        word in str(error).lower() for word in _GONE_WORDS
    )


@contextlib.contextmanager
def _noticing_the_end() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise GoneError("another process of this training has ended.") from error


_here = Processes()
_met = False


def have_met() -> bool:
    """Whether this process has met others; before that, all come to the same errors."""
    return _met


def here() -> Processes:
    """Return the processes that this one trains with; alone where `joined` was not entered."""
    return _here


@contextlib.contextmanager
def joined(launch: Launch, device: str) -> Iterator[Processes]:
    """Meet the other processes, and part from them when all is done.

    After an error nobody waits for the others: `leave` ends the process.

    Args:
        launch: How this one was started.
        device: "cuda" or "cpu": over what gradients go.
    """
    global _here, _met
    if launch.size == 1:
        yield _here
        return
    import torch.distributed as dist

    if Path("/sys/class/net/lo").exists():  # one host: its name need not resolve to anything
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if device == "cuda":
        _spare_old_drivers()
    if launch.rank:
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call] # transformers' own
    try:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        _met = True
        raise GoneError(f"the processes must meet, but {_first_line(error)}.") from error
    _here, _met = Processes(rank=launch.rank, size=launch.size, _group=group), True
    try:
        yield _here
        _here.numbers(0.0)  # the first may still be writing
        dist.destroy_process_group()
    finally:
        _here = Processes()


def _spare_old_drivers() -> None:
    """Turn off what the drivers of some RTX 4000 cards lack, as `accelerate launch` does."""
    from accelerate.utils import check_cuda_p2p_ib_support

    if not check_cuda_p2p_ib_support():
        os.environ.setdefault("NCCL_P2P_DISABLE", "1")
        os.environ.setdefault("NCCL_IB_DISABLE", "1")


def leave(code: int) -> NoReturn:
    """End a process whose peers may be in a step that never ends.

    What is registered for the end is left out: it would wait for them.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
