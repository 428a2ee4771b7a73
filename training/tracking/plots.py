"""Plots of a run for the MLflow page. In: RUN's metric files. Out: RUN/report/loss.png, speed.png. Cost: a second."""

import base64
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


def write_bars(path: Path, panels: list[tuple[str, dict[str, tuple[float, float]]]]) -> Path:
    """One picture: a panel each, with its title, of shares before and now by label."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.6 * len(panels)), layout="constrained")
    for number, (title, bars) in enumerate(panels):
        axes = figure.add_subplot(len(panels), 1, number + 1, title=title)
        for offset, label in ((-0.2, "before"), (0.2, "now")):
            shares = [values[label == "now"] for values in bars.values()]
            axes.bar([place + offset for place in range(len(bars))], shares, 0.4, label=label)
        axes.set_xticks(range(len(bars)), list(bars), rotation=20 if len(bars) > 2 else 0)
        axes.legend()
    path.parent.mkdir(exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)
    return path


def data_uri(path: Path) -> str:
    """A picture as an address that holds it: pages and artifacts cannot read files."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


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
