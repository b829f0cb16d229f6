"""Whether to write colours: on a terminal that shows them, unless the user has asked for none."""

from __future__ import annotations


def has_colours() -> bool:
    """Return whether stdout shows colours: NO_COLOR, FORCE_COLOR and TERM are heeded."""
    from rich.console import Console

    console = Console()
    return console.color_system is not None and not console.no_color
