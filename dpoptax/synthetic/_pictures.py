"""Pictures of noisy tables beside synthetic ones. They show nothing that was not released."""

import math
import pathlib

import numpy as np

from dpoptax.synthetic._coarse import shares
from dpoptax.synthetic._marginals import Measured, counts_of

COLUMNS = 3


def save_pictures(
    measured: Measured, cells: dict[str, np.ndarray], folder: pathlib.Path
) -> list[pathlib.Path]:
    """Draws `one_way.png` and `two_way.png`, and returns their paths."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from error
    names = list(measured.columns)
    figure = Figure(figsize=(12, 2.4 * math.ceil(len(names) / COLUMNS)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(math.ceil(len(names) / COLUMNS), COLUMNS, squeeze=False)
    for name, axis in zip(names, axes.flat, strict=False):
        noisy, total = measured.fine[name], measured.total
        synthetic = counts_of([cells[name]], noisy.shape)
        places = np.arange(len(noisy))
        axis.bar(places, synthetic / max(synthetic.sum(), 1), color="tab:blue", alpha=0.5)
        axis.errorbar(
            places,
            noisy / total,
            yerr=2 * measured.fine_stddev[name] / total,
            fmt=".",
            color="black",
            markersize=3,
            linewidth=0.8,
        )
        axis.set_title(name, fontsize=9)
        labels = [measured.columns[name].label(cell) for cell in range(len(noisy))]
        step = max(1, len(labels) // 8)
        axis.set_xticks(places[::step], labels[::step], rotation=30, fontsize=6, ha="right")
    for axis in list(axes.flat)[len(names) :]:
        axis.set_visible(False)
    figure.suptitle(
        "Synthetic shares (bars) and released noisy shares (dots, 2 standard deviations)"
    )
    paths = [folder / "one_way.png", folder / "two_way.png"]
    figure.savefig(paths[0], dpi=100)

    figure = Figure(figsize=(6, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    coarse = {name: part.group[cells[name]] for name, part in measured.coarse.items()}
    for table in measured.tables:
        if len(table.columns) == 2:
            synthetic = counts_of([coarse[name] for name in table.columns], table.counts.shape)
            noisy = shares(table.counts.ravel(), measured.total)
            axis.plot(noisy, synthetic.ravel() / max(synthetic.sum(), 1), ".", markersize=3)
    lowest = 1 / measured.total
    axis.plot([lowest, 1], [lowest, 1], color="black", linewidth=0.8)
    axis.set(xscale="log", yscale="log", xlim=(lowest, 1), ylim=(lowest, 1))
    axis.set(xlabel="released share of a cell of a two-way table", ylabel="synthetic share")
    figure.savefig(paths[1], dpi=100)
    return paths
