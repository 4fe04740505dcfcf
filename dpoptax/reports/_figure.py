"""Figure of a report: the trade-off curve of the best attacker, and epsilon over delta."""

import math
import pathlib
from typing import Any, NamedTuple

import numpy as np

from dpoptax.reports._round import round_up


class AttackCurves(NamedTuple):
    """True positive rates over false positive rates.

    Attributes:
        rates: the false positive rates.
        found: the true positive rates of the best attack.
        bounds: other curves, by label.
        marked: the points that the report names.
        unit: what is protected.
        reached: the rates of an attack that was made, and their intervals; or None.
    """

    rates: np.ndarray
    found: np.ndarray
    bounds: dict[str, np.ndarray]
    marked: dict[float, float]
    unit: str
    reached: Any = None


class GuaranteeCurve(NamedTuple):
    """Epsilon over delta.

    Attributes:
        deltas: of the curve.
        epsilons: of the curve.
        point: the (delta, epsilon) of the guarantee, if there is one.
        num_units: delta belongs well below 1 / num_units.
        unit: what is protected.
        title: of the panel.
    """

    deltas: np.ndarray
    epsilons: np.ndarray
    point: tuple[float, float] | None
    num_units: int
    unit: str
    title: str


def save(path: pathlib.Path, attack: AttackCurves, guarantee: GuaranteeCurve) -> None:
    """Draws both panels; the file's ending chooses the format."""
    figure = _new_figure(10)
    left, right = figure.subplots(1, 2)
    _draw_attack(left, attack)
    _draw_guarantee(right, guarantee)
    _write(figure, path)


def save_attack(path: pathlib.Path, attack: AttackCurves, title: str) -> None:
    """Draws an attack that was made beside the best one that the guarantee allows."""
    figure = _new_figure(6)
    axes = figure.subplots()
    _draw_attack(axes, attack)
    axes.set_title(title)
    _write(figure, path)


def _new_figure(width: float) -> Any:
    try:
        from matplotlib.figure import Figure  # optional, and slow to import
    except ImportError:
        raise ImportError("a figure needs matplotlib: pip install matplotlib.") from None
    return Figure(figsize=(width, 4.4), layout="constrained")


def _write(figure: Any, path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def _draw_attack(axes: Any, curves: AttackCurves) -> None:
    rates, smallest = curves.rates, float(curves.rates[0])
    axes.plot(rates, rates, color="0.6", linestyle=":", label="guessing")
    best = "best attack on this run" if curves.reached is None else "best possible attack"
    axes.plot(rates, curves.found, color="C0", linewidth=2, label=best)
    styles: tuple[dict[str, Any], ...] = (
        {"color": "C2", "linestyle": "--"},
        {"color": "C3", "linewidth": 1},
    )
    # No bounds where the run had no noise.
    for (label, bound), style in zip(curves.bounds.items(), styles, strict=False):
        axes.plot(rates, bound, label=label, **style)
    if curves.reached is not None:
        _draw_reached(axes, curves)
    for rate, value in curves.marked.items():
        axes.plot([rate], [value], "o", color="C0")
        axes.annotate(f"{100 * value:.2g} %", (rate, value), (6, -12), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlim=(smallest, 1), ylim=(smallest, 1.2))
    axes.set_xlabel(f"unused {curves.unit}s wrongly said to be used (false positive rate)")
    axes.set_ylabel(f"used {curves.unit}s recognized (true positive rate)")
    axes.set_title("What the best possible attacker can find out")
    axes.legend(loc="lower right", fontsize=8)


def _draw_reached(axes: Any, curves: AttackCurves) -> None:
    reached = curves.reached
    rates, found = reached.false_positive_rates, reached.true_positive_rates
    axes.plot(rates, found, color="C1", drawstyle="steps-post", label="attack that was made")
    # Each threshold has an interval for both rates. What no threshold excludes is shaded.
    grid = curves.rates
    excluded = reached.false_positive_high[:, None] <= grid
    low = np.where(excluded, reached.true_positive_low[:, None], 0.0).max(axis=0)
    excluded = reached.false_positive_low[:, None] >= grid
    high = np.where(excluded, reached.true_positive_high[:, None], 1.0).min(axis=0)
    label = "its 95 % interval at each threshold"
    axes.fill_between(grid, low, high, color="C1", alpha=0.2, linewidth=0, label=label)


def _draw_guarantee(axes: Any, curve: GuaranteeCurve) -> None:
    axes.plot(curve.deltas, curve.epsilons, color="C0", linewidth=2)
    if curve.point is not None:
        delta, epsilon = curve.point
        axes.plot([delta], [epsilon], "o", color="C0")
        text = f"ε = {round_up(epsilon)} at δ = {delta:.2g}"
        axes.annotate(text, curve.point, (8, 6), textcoords="offset points")
    one_in_all = 1 / curve.num_units
    # To the left of a line that is near the right edge.
    is_right = one_in_all > 10 * math.sqrt(curve.deltas[0] * curve.deltas[-1])
    axes.axvline(one_in_all, color="0.6", linestyle=":")
    axes.annotate(
        f"1 / number of {curve.unit}s",
        (one_in_all, axes.get_ylim()[1]),
        (-4 if is_right else 4, -12),
        textcoords="offset points",
        horizontalalignment="right" if is_right else "left",
        color="0.4",
        fontsize=8,
    )
    axes.set(xscale="log", ylim=(0, None))
    axes.set_xlabel("δ")
    axes.set_ylabel("ε")
    axes.set_title(curve.title)
