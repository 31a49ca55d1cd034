"""The loss curve as an image."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure


def draw_curve(losses: Mapping[str, Sequence[tuple[int, float]]]) -> bytes:
    """Draw training and validation loss over steps.

    Args:
        losses: Pairs of step and loss, for `train` and `validation`.

    Returns:
        A PNG, reproducible to the byte.
    """
    figure = Figure(figsize=(7, 3.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    train, validation = losses.get("train", []), losses.get("validation", [])
    axes.plot([step for step, _ in train], [loss for _, loss in train], color="#7aa6c2", linewidth=1, label="training")
    if validation:
        steps, values = zip(*validation, strict=True)
        axes.plot(steps, values, color="#b3541e", marker="o", markersize=4, label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()
