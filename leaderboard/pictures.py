"""Draws the figures of the leaderboard."""

import itertools
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from leaderboard.recipe import Recipe
from leaderboard.records import Record
from leaderboard.task import Metric, Task

MARKS = "D^vsP*X<>"


def scores_over_epsilon(
    task: Task, rows: Mapping[Recipe, Sequence[Record]], path: pathlib.Path
) -> None:
    """One panel per metric: a line per recipe, a mark per published result."""
    figure = Figure(figsize=(7.2, 4.0 * len(task.metrics)), dpi=150, layout="constrained")
    panels = figure.subplots(len(task.metrics), squeeze=False)[:, 0]
    for metric, axes in zip(task.metrics, panels, strict=True):
        _draw(axes, metric, task, rows)
    figure.savefig(path)


def _draw(axes: Axes, metric: Metric, task: Task, rows: Mapping[Recipe, Sequence[Record]]) -> None:
    ticks = {result.epsilon for result in task.published if math.isfinite(result.epsilon)}
    without: list[float] = []
    for recipe, found in rows.items():
        grouped: dict[float, list[float]] = {}
        for record in found:
            if metric.name in record["scores"]:
                value = record["scores"][metric.name]
                grouped.setdefault(float(record["run"]), []).append(value)
        if plain := grouped.pop(math.inf, None):
            without.append(statistics.mean(plain))
        points = sorted(grouped)
        ticks.update(points)
        means = [statistics.mean(grouped[point]) for point in points]
        spreads = [
            statistics.stdev(grouped[point]) if grouped[point][1:] else 0.0 for point in points
        ]
        axes.errorbar(points, means, spreads, marker="o", capsize=3, label=recipe.title)
    _published(axes, metric, task)
    if without:
        best = max(without) if metric.higher_is_better else min(without)
        axes.axhline(best, color="0.4", linestyle="--", label="best recipe, not private")
    unit = f", {metric.unit}" if metric.unit else ""
    axes.set(xscale="log", xlabel=f"ε at δ = {task.delta:g}", ylabel=f"{metric.name}{unit}")
    shown = _spread_out(sorted(ticks))
    axes.set_xticks(shown, [f"{tick:g}" for tick in shown])
    axes.minorticks_off()
    # Matplotlib lists lines with error bars last; ours come first.
    handles, labels = axes.get_legend_handles_labels()
    order = [*range(len(handles) - len(rows), len(handles)), *range(len(handles) - len(rows))]
    axes.legend(
        [handles[place] for place in order],
        [labels[place] for place in order],
        frameon=False,
        fontsize=8,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
    )
    axes.spines[["top", "right"]].set_visible(False)


def _published(axes: Axes, metric: Metric, task: Task) -> None:
    """Draws the published results; one mark for each method."""
    by_name: dict[str, list[tuple[float, float]]] = {}
    for result in task.published:
        if result.metric == metric.name and math.isfinite(result.epsilon):
            by_name.setdefault(result.name, []).append((result.epsilon, result.value))
    marks = zip(itertools.count(), by_name.items(), itertools.cycle(MARKS))
    for place, (name, points), mark in marks:
        # Hollow, and each larger than the one before: equal results stay visible.
        axes.plot(
            *zip(*points, strict=True), mark, color="0.35", fillstyle="none",
            markersize=5 + 2 * (place % 5), label=f"{name}, published",
        )  # fmt: skip


def _spread_out(ticks: Sequence[float]) -> list[float]:
    """Leaves out ticks whose labels would overlap on the logarithmic axis."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or tick > 1.3 * kept[-1]:
            kept.append(tick)
    return kept
