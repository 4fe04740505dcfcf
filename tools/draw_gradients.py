"""Draws the figures of docs/how_gradients_work.md: shapes, Gram matrices, and passes.

python tools/draw_gradients.py docs/images
"""

import contextlib
import pathlib
import re
import sys
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

import dpoptax

ROOT = pathlib.Path(__file__).parents[1]
INPUT, COTANGENT, GRADIENT, PASS = "#4477aa", "#ee7733", "#228833", "#999999"
DPI = 140
FONT = {"ha": "center", "va": "center", "fontsize": 11}
LARGE = FONT | {"fontsize": 15}


def canvas(width: float, height: float) -> Axes:
    """Returns axes without a frame, with one unit per tenth of an inch."""
    figure, axes = plt.subplots(figsize=(width / 10, height / 10))
    axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    return axes


def save(axes: Axes, path: pathlib.Path) -> None:
    """Writes the figure."""
    axes.figure.savefig(path, dpi=DPI, facecolor="white")
    plt.close(axes.figure)


def cells(axes: Axes, x: float, y: float, values: np.ndarray, color: str, side: float = 2) -> None:
    """Draws a matrix with its lower left corner at (x, y); a darker cell is a larger number."""
    rows, columns = values.shape
    scale = np.abs(values).max()
    for row in range(rows):
        for column in range(columns):
            corner = (x + column * side, y + (rows - 1 - row) * side)
            strength = 0.12 + 0.88 * abs(values[row, column]) / scale
            axes.add_patch(Rectangle(corner, side, side, facecolor="white", edgecolor="none"))
            axes.add_patch(
                Rectangle(
                    corner, side, side, facecolor=color, alpha=strength, edgecolor="white", lw=1
                )
            )


def factors(path: pathlib.Path) -> None:
    """The gradients of a dense layer for three examples: held whole, and as two factors."""
    rng = np.random.default_rng(3)
    inputs, cotangents = rng.uniform(0.1, 1, (3, 7)), rng.uniform(0.1, 1, (3, 5))
    axes = canvas(70, 36)
    axes.text(17, 33.5, "one gradient per example", weight="bold", **FONT)
    axes.text(53, 33.5, "two factors", weight="bold", **FONT)
    axes.plot([35, 35], [2, 34.5], color="#cccccc", lw=1)
    for number in range(3):
        gradient = np.outer(inputs[number], cotangents[number])
        cells(axes, 1.5 + 11 * number, 13, gradient, GRADIENT, 1.8)
        axes.text(6 + 11 * number, 28, f"$\\nabla_{number + 1}$", **LARGE)
    axes.text(17, 8, "$\\nabla_i = a_i\\,g_i^T$", **LARGE)
    axes.text(17, 3, "batch x inputs x outputs numbers", **FONT)
    for left, values, color, name in (
        (38, inputs, INPUT, "inputs $A$"),
        (56.5, cotangents, COTANGENT, "cotangents $G$"),
    ):
        cells(axes, left, 22, values, color)
        axes.text(left + values.shape[1], 29.8, name, **FONT)
    axes.text(53, 17, "$\\|\\nabla_i\\| = \\|a_i\\| \\cdot \\|g_i\\|$", **LARGE)
    axes.text(53, 9.8, "$\\sum_i w_i \\nabla_i = A^T \\mathrm{diag}(w)\\, G$", **LARGE)
    axes.text(53, 3, "batch x (inputs + outputs) numbers", **FONT)
    save(axes, path)


def gram(path: pathlib.Path) -> None:
    """The norm of a gradient that sums over positions, from two small matrices."""
    rng = np.random.default_rng(5)
    inputs, cotangents = rng.normal(size=(4, 9)), rng.normal(size=(4, 8))
    products = inputs @ inputs.T, cotangents @ cotangents.T
    axes = canvas(70, 40)
    axes.text(11, 37, "inputs $a_t$", **FONT)
    axes.text(11, 18, "cotangents $g_t$", **FONT)
    axes.text(0.9, 31, "4 tokens", rotation=90, **FONT | {"fontsize": 9})
    axes.text(0.9, 12, "4 tokens", rotation=90, **FONT | {"fontsize": 9})
    cells(axes, 2, 27, inputs, INPUT)
    cells(axes, 3, 8, cotangents, COTANGENT)
    for height, values, color, name in (
        (27, products[0], INPUT, "$a_t \\cdot a_s$"),
        (8, products[1], COTANGENT, "$g_t \\cdot g_s$"),
    ):
        axes.annotate(
            "", (29, height + 4), (21.5, height + 4), arrowprops={"arrowstyle": "->", "lw": 1.4}
        )
        cells(axes, 30, height, values, color)
        axes.text(34, height + 10, name, **FONT)
        axes.plot([39, 43], [height + 4, 22], color="#777777", lw=1.2)
    axes.text(34, 22.2, "times", **FONT)
    cells(axes, 44, 18, products[0] * products[1], GRADIENT)
    axes.annotate("", (57.5, 22), (53, 22), arrowprops={"arrowstyle": "->", "lw": 1.4})
    axes.text(55.2, 24.3, "add up", **FONT | {"fontsize": 9})
    axes.text(63.5, 22, "$\\|\\nabla\\|^2$", **LARGE)
    axes.text(35, 3, "4 x 4 products in place of a 9 x 8 gradient", **FONT)
    save(axes, path)


def held(form: str) -> float:
    """Returns the MiB that a form holds beyond a plain gradient, for the model of the page."""
    page = (ROOT / "docs" / "how_gradients_work.md").read_text()
    names: dict[str, Any] = {}
    for program in re.findall(r"```python\n(.*?)```", page, re.DOTALL)[:2]:
        with contextlib.redirect_stdout(None):
            exec(program, names)
    rows = dpoptax.explain(names["loss_fn"], names["params"], names["batch"], form=form)
    return sum(row.num_bytes for row in rows) * len(names["batch"][1]) / 2**20


def passes(path: pathlib.Path) -> None:
    """What each form runs, and what it holds for the model of the page."""
    axes = canvas(70, 36)
    rows = (
        ("stacked", ["forward", "backward", "norms,\nsum"], GRADIENT, "all gradients"),
        ("factored", ["forward", "backward", "norms,\nsum"], INPUT, "inputs and cotangents"),
        (
            "recomputed",
            ["forward", "backward:\nnorms", "backward:\nsum"],
            PASS,
            "no more than plain",
        ),
    )
    axes.text(27, 33.5, "what runs", weight="bold", **FONT)
    axes.text(57, 33.5, "what is held", weight="bold", **FONT)
    longest = held("stacked")
    for number, (name, steps, color, words) in enumerate(rows):
        y = 24 - 10.5 * number
        axes.text(0.5, y + 3, name, **FONT | {"ha": "left", "weight": "bold"})
        for place, step in enumerate(steps):
            x = 13 + 10.2 * place
            axes.add_patch(Rectangle((x, y), 8, 6, facecolor="#eeeeee", edgecolor="#666666"))
            axes.text(x + 4, y + 3, step, **FONT | {"fontsize": 9})
            if place:
                axes.annotate("", (x, y + 3), (x - 2.2, y + 3), arrowprops={"arrowstyle": "->"})
        size = held(name)
        axes.add_patch(Rectangle((46, y + 3.2), 22 * size / longest, 2.6, facecolor=color))
        axes.text(46, y + 1, f"{size:.1f} MiB: {words}", **FONT | {"ha": "left", "fontsize": 10})
    save(axes, path)


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    plt.rcParams["font.family"] = "DejaVu Sans"
    factors(folder / "gradients_factors.png")
    gram(folder / "gradients_gram.png")
    passes(folder / "gradients_passes.png")
