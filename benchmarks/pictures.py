"""Draws the figures of the benchmark page."""

import pathlib

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks import results
from benchmarks.peers.environments import PEERS

# One colour per system, everywhere.
COLOURS = {
    "jax": "0.6",
    "dpoptax": "#d1495b",
    "dpoptax_chacha20": "#edae49",
    "vmap": "#30638e",
    "optax": "#00798c",
    "jax_privacy": "#7768ae",
    "torch": "0.8",
    "opacus_hooks": "#66a182",
    "opacus_ghost": "#a1c181",
    "plain": "0.6",
    "factored": "#d1495b",
    "stacked": "#30638e",
}
LABELS = {"plain": "not private", "factored": "dpoptax", "stacked": "vmap of grad"}


def side_by_side(rows: dict[str, results.Cells], batch: int, folder: pathlib.Path) -> pathlib.Path:
    """Draws milliseconds of every system on every model, on a log axis."""
    peers = [peer for peer in PEERS if any(peer in cells for cells in rows.values())]
    figure = Figure(figsize=(11, 4.2), dpi=130)
    axis = figure.subplots()
    width = 0.85 / len(peers)
    for place, peer in enumerate(peers):
        heights = [1e3 * (results.median(cells.get(peer)) or np.nan) for cells in rows.values()]
        left = np.arange(len(rows)) + (place - (len(peers) - 1) / 2) * width
        axis.bar(left, heights, width, color=COLOURS[peer], label=PEERS[peer].title)
    axis.set_xticks(np.arange(len(rows)), rows)
    axis.set(yscale="log", ylabel="milliseconds of a step")
    axis.set_title(f"A training step at batch {batch}", loc="left")
    return _finished(figure, axis, folder / f"side_by_side_{batch}.png")


def cumulative(rows: dict[str, results.Cells], folder: pathlib.Path) -> pathlib.Path:
    """Draws the time until a step is done, the first one's start included."""
    chosen = [model for model in ("mnist", "vae", "lstm", "transformer") if model in rows]
    chosen = chosen or list(rows)[:4]
    figure = Figure(figsize=(3.2 * len(chosen), 3.6), dpi=130)
    axes = figure.subplots(1, len(chosen), squeeze=False)[0]
    steps = np.geomspace(1, 1e4, 60)
    for model, axis in zip(chosen, axes, strict=True):
        for peer, cell in rows[model].items():
            seconds = results.median(cell)
            if seconds is not None:
                axis.plot(
                    steps,
                    cell["start_seconds"] + seconds * steps,
                    color=COLOURS[peer],
                    linestyle="--" if peer in ("jax", "torch") else "-",
                    label=PEERS[peer].title,
                )
        axis.set(xscale="log", yscale="log", xlabel="steps")
        axis.set_title(model, loc="left")
    axes[0].set_ylabel("seconds, start included")
    return _finished(figure, axes[-1], folder / "cumulative.png")


def of_study(
    name: str, cells: dict[str, results.Cells], folder: pathlib.Path
) -> pathlib.Path | None:
    """Draws a study, if there is a picture for it."""
    drawers = {"growth": growth, "layers": layers}
    return drawers[name](cells, folder) if name in drawers else None


def growth(cells: dict[str, results.Cells], folder: pathlib.Path) -> pathlib.Path:
    """Draws time against what grows, on log axes."""
    kinds = list(dict.fromkeys(title.split(", ")[0] for title in cells))
    figure = Figure(figsize=(3.4 * len(kinds), 3.4), dpi=130)
    axes = figure.subplots(1, len(kinds), squeeze=False)[0]
    for kind, axis in zip(kinds, axes, strict=True):
        rows = {
            int(title.split(", ")[1]): row for title, row in cells.items() if title.startswith(kind)
        }
        for form in ("plain", "factored", "stacked"):
            points = [
                (size, 1e3 * seconds)
                for size, row in sorted(rows.items())
                if (seconds := results.median(row.get(form))) is not None
            ]
            if points:
                axis.plot(*zip(*points, strict=True), "o-", color=COLOURS[form], label=LABELS[form])
        axis.set(xscale="log", yscale="log", xlabel=kind)
        axis.set_xticks(list(rows), [f"{size:,}" for size in rows], minor=False)
        axis.minorticks_off()
    axes[0].set_ylabel("milliseconds")
    return _finished(figure, axes[-1], folder / "growth.png")


def layers(cells: dict[str, results.Cells], folder: pathlib.Path) -> pathlib.Path:
    """Draws what privacy costs in time and memory, by layer."""
    figure = Figure(figsize=(11, 0.38 * len(cells) + 1.2), dpi=130)
    axes = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(cells))[::-1]
    for offset, form in ((0.2, "factored"), (-0.2, "stacked")):
        times = [results.ratio(row, form, "plain") or np.nan for row in cells.values()]
        memory = [row[form]["mib"] / max(row["plain"]["mib"], 1e-2) for row in cells.values()]
        for axis, values in zip(axes, (times, memory), strict=True):
            axis.barh(places + offset, values, 0.38, color=COLOURS[form], label=LABELS[form])
    axes[0].set_yticks(places, cells)
    for axis, what in zip(axes, ("time", "temporary memory"), strict=True):
        axis.axvline(1, color="0.4", linewidth=0.8)
        axis.set(xscale="log", xlabel=f"{what}, over the gradient without privacy")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    return _finished(figure, axes[-1], folder / "layers.png")


def _finished(figure: Figure, last, path: pathlib.Path) -> pathlib.Path:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2, which="major")
        axis.set_axisbelow(True)
    last.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, bbox_inches="tight")
    return path
