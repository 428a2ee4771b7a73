"""Plots of a run for the MLflow page. In: RUN's metric files. Out: RUN/report/loss.png, speed.png. Cost: a second."""

from pathlib import Path
from typing import Any

from training import run_files
from training.tracking.run_record import new_lines


def write_plots(run_dir: Path) -> list[Path]:
    """Draw what there is; nothing for a run without steps."""
    steps = new_lines(run_dir / run_files.METRICS, 0)[1]
    if not steps:
        return []
    evaluations = new_lines(run_dir / run_files.EVALUATIONS, 0)[1]
    (run_dir / run_files.REPORT).mkdir(exist_ok=True)
    return [
        _draw(run_dir / run_files.LOSS_PLOT, "loss per target token", {"training": (steps, "loss"),
              "held out": (evaluations, "eval_loss")}),
        _draw(run_dir / run_files.SPEED_PLOT, "target tokens per second", {"": (steps, "target_tokens_per_second")}),
    ]  # fmt: skip


def _draw(path: Path, title: str, curves: dict[str, tuple[list[dict[str, Any]], str]]) -> Path:
    """One figure; the object interface of matplotlib needs no display and no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="optimizer step", title=title)
    for label, (lines, name) in curves.items():
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 30 else "")
    if len(curves) > 1:
        axes.legend()
    axes.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(path)
    return path
