"""A command that several processes run together: one speaks, and none outlives an error.

Errors before the processes have met, and those that all know of, are the first one's to say; what
only one knows it says itself.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable

import click

from lora_advisor.advisor.launched import Launch, launched
from lora_advisor.probes.errors import AdvisorError, UsageError

#: Exit code of a command that Ctrl-C has ended.
_INTERRUPTED = 130


def as_one_of(action: Callable[[Launch], int]) -> int:
    """Run a command's action as one of the processes that a launcher has started.

    Args:
        action: Takes how this process was started, and returns the exit code.

    Returns:
        The exit code. After an error the process ends here: those that wait for it must not wait.
    """
    from lora_advisor.advisor.processes import leave

    try:
        launch = launched()
    except UsageError as error:
        if os.environ.get("RANK", "0") != "0":
            leave(error.exit_code)
        raise
    if launch.size == 1:
        return action(launch)
    try:
        code = action(launch)
    except (Exception, KeyboardInterrupt) as error:
        code = _say(error, launch)
    if code:
        leave(code)
    return code


def _say(error: BaseException, launch: Launch) -> int:
    """Say an error, if it is this process's to say; return the exit code."""
    from lora_advisor.advisor.guards import DivergedError
    from lora_advisor.advisor.processes import GoneError, have_met, is_agreed
    from lora_advisor.advisor.stopping import Interrupted

    shared = is_agreed(error) or not have_met() or isinstance(error, DivergedError | Interrupted)
    # Of a process that has gone the second says it too: it may have been the first.
    mine = launch.rank < 2 if isinstance(error, GoneError) else launch.rank == 0 or not shared
    code = getattr(error, "exit_code", AdvisorError.exit_code)
    if isinstance(error, KeyboardInterrupt):
        code, text = _INTERRUPTED, "interrupted; what a checkpoint holds is kept"
        mine = launch.rank == 0
    elif isinstance(error, Interrupted):
        text = str(error)
    elif isinstance(error, AdvisorError):
        text = f"Error: {error}"
    else:
        if os.environ.get("LORA_ADVISOR_DEBUG"):
            traceback.print_exception(error)
        first = (str(error).strip().splitlines() or [""])[0]
        text = (
            f"Error: an error of lora-advisor itself, in process {launch.rank} of {launch.size}: "
            f"{type(error).__name__}: {first} (LORA_ADVISOR_DEBUG=1 shows where)"
        )
    if mine:
        click.echo(text, err=True)
    return int(code)
