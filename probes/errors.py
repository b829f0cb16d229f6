"""What can go wrong because of the caller, and the exit code each kind ends the program with.

The codes from 64 on are those of BSD's `sysexits.h`; 0, 1 and 2 are answers (`fit`), never errors.
"""

from __future__ import annotations

from typing import ClassVar


class AdvisorError(Exception):
    """A condition the caller must mend, said in one sentence."""

    exit_code: ClassVar[int] = 70


class UsageError(AdvisorError):
    """A word, number or combination that is not legal."""

    exit_code = 64


class UntraceableError(UsageError):
    """A step that only a probe on a card can measure."""


class DataError(AdvisorError):
    """A file that exists but does not hold what it must."""

    exit_code = 65


class MissingInputError(AdvisorError):
    """A file, folder or model that is not there."""

    exit_code = 66


class UnavailableError(AdvisorError):
    """A package, device or service this machine lacks."""

    exit_code = 69


class UnrecordableError(UnavailableError):
    """A micro-batch that cannot be a CUDA graph; its sentence begins with `UNRECORDABLE`."""


#: How the sentence begins: a probe's child hands over the sentence alone.
UNRECORDABLE = "the micro-batch cannot be recorded as a CUDA graph"


class OutputError(AdvisorError):
    """A place that cannot be written."""

    exit_code = 73


class BusyError(AdvisorError):
    """A device that another process is using."""

    exit_code = 75


class StackError(AdvisorError):
    """A plan or record that was made on another machine or stack."""

    exit_code = 78
