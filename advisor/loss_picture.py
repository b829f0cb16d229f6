"""The loss of a training as a picture; matplotlib without its global state."""

from __future__ import annotations

from pathlib import Path

from lora_advisor.advisor.outcome import TrainingResult
from lora_advisor.advisor.pictures import write_png

#: Width and height in inches, and dots an inch: 1050 x 600.
SIZE, DPI = (7.0, 4.0), 150


def draw_loss(result: TrainingResult, path: Path) -> None:
    """Write the training loss by step, and the hold-out's before and after, as a PNG.

    Raises:
        OutputError: The place cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    steps, losses = zip(*result.losses, strict=True) if result.losses else ((), ())
    axes.plot(steps, losses, color="#0072b2", linewidth=1.2, label="training")
    held = [(0, result.eval_loss_before), (result.steps, result.eval_loss_after)]
    points = [point for point in held if point[1] is not None]
    if points:
        axes.plot(*zip(*points, strict=True), color="#d55e00", marker="o", linestyle="none",
                  label="hold-out, before and after")  # fmt: skip
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("DPO loss" if result.config.stage == "dpo" else "loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", fontsize=8)
    write_png(figure, path)
