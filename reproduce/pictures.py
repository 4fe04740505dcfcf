"""Draws the figures of the reproduction page."""

import pathlib
from collections.abc import Iterable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def areas(sizes: Sequence[int], curves: Mapping[str, Sequence[float]], path: pathlib.Path) -> None:
    """Area under the curve over the size of the data, a curve for each kind of model."""
    figure = Figure(figsize=(6.4, 4.6), dpi=150, layout="constrained")
    # The plain model lies so far below that one axis would squeeze the others into a line.
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    for kind, values in curves.items():
        style = {"plain": ":", "not private": "--"}.get(kind, "-")
        axes = below if kind == "plain" else above
        axes.plot(sizes, values, style, marker="o", label=kind.replace("epsilon", "ε ="))
    for axes in (above, below):
        _plain(axes)
    below.set(xscale="log", xlabel="people in the data, N")
    below.set_xticks(sizes, [str(size) for size in sizes])
    below.minorticks_off()
    figure.supylabel("area under the curve", fontsize=10)
    figure.savefig(path)


def likelihoods(
    curve: Iterable[tuple[float | None, float]], truth: float | None, path: pathlib.Path
) -> None:
    """Predictive log-likelihood over epsilon; None is a run without privacy."""
    points = list(curve)
    private = sorted((epsilon, value) for epsilon, value in points if epsilon is not None)
    figure = Figure(figsize=(6.4, 3.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*private, strict=True), "o-", label="private")
    for epsilon, value in points:
        if epsilon is None:
            axes.axhline(value, color="0.4", linestyle="--", label="not private")
    if truth is not None:
        axes.axhline(truth, color="0.4", linestyle=":", label="the law that drew the points")
    axes.set(xscale="log", xlabel="ε at δ = 0.001", ylabel="log-likelihood of a new point")
    _plain(axes)
    figure.savefig(path)


def epochs(
    sizes: Mapping[int, Mapping[str, float]], columns: Sequence[str], path: pathlib.Path
) -> None:
    """Seconds per epoch over the batch size, a curve for each kind of step."""
    figure = Figure(figsize=(6.4, 3.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    for column in columns:
        axes.plot(list(sizes), [found[column] for found in sizes.values()], "o-", label=column)
    axes.set(xscale="log", yscale="log", xlabel="batch size", ylabel="seconds per epoch")
    axes.set_xticks(list(sizes), [str(size) for size in sizes])
    axes.set_yticks([2, 4, 8, 16, 32], ["2", "4", "8", "16", "32"])
    seconds = [found[column] for found in sizes.values() for column in columns]
    axes.set_ylim(0.8 * min(seconds), 1.25 * max(seconds))
    axes.minorticks_off()
    _plain(axes)
    figure.savefig(path)


def _plain(axes: Axes) -> None:
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
