"""Write a figure of matplotlib's as a PNG file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_advisor.probes.errors import OutputError


def write_png(figure: Any, path: Path) -> None:
    """Write a figure.

    Raises:
        OutputError: The place cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    try:
        with path.open("wb") as file:
            canvas.print_png(file)
    except OSError as error:
        raise OutputError(
            f"`{path}` must be a place that can be written, but {error.strerror}."
        ) from None
