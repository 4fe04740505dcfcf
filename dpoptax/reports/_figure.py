"""A report in, a picture of what an attacker can do out."""

import math
import pathlib
from typing import Any

import numpy as np
import scipy.stats

from dpoptax.accounting import trade_off
from dpoptax.reports._report import Report, round_up

LEAST_RATE = 1e-5


def save(report: Report, path: pathlib.Path) -> None:
    """Draws the trade-off curve and epsilon over delta.

    Args:
        report: of a run.
        path: of the image; its ending names the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("a picture needs matplotlib: pip install matplotlib.") from None
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    attack, guarantee = figure.subplots(1, 2)
    _draw_attack(attack, report)
    _draw_guarantee(guarantee, report)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def _draw_attack(axes: Any, report: Report) -> None:
    rates = np.geomspace(LEAST_RATE, 1.0, 400)
    axes.plot(rates, rates, color="0.6", linestyle=":", label="guessing")
    found = trade_off.true_positive_rates(report.loss, rates)
    axes.plot(rates, found, color="C0", linewidth=2, label="best attack on this run")
    if math.isfinite(report.mu):
        gaussian = scipy.stats.norm.cdf(scipy.stats.norm.ppf(rates) + report.mu)
        axes.plot(rates, gaussian, color="C2", linestyle="--", label=f"{report.mu:.2f}-GDP")
        bound = np.minimum(
            math.exp(min(report.epsilon, 700.0)) * rates + report.delta,
            1 - math.exp(-report.epsilon) * (1 - report.delta - rates),
        )
        label = f"what ({round_up(report.epsilon)}, {report.delta:.2g})-DP alone would allow"
        axes.plot(rates, np.minimum(bound, 1.0), color="C3", linewidth=1, label=label)
    for rate, value in report.true_positive_rate.items():
        axes.plot([rate], [value], "o", color="C0")
        axes.annotate(f"{100 * value:.2g} %", (rate, value), (6, -12), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlim=(LEAST_RATE, 1), ylim=(LEAST_RATE, 1.2))
    axes.set_xlabel(f"{report.unit}s wrongly said to be members (false positive rate)")
    axes.set_ylabel("members found (true positive rate)")
    axes.set_title("What an attacker can find out")
    axes.legend(loc="lower right", fontsize=8)


def _draw_guarantee(axes: Any, report: Report) -> None:
    least, most = report.delta / 100, min(1000 * report.delta, 0.1)
    largest = report.loss.epsilon(least)
    epsilons = np.linspace(0.0, largest if math.isfinite(largest) else 1.0, 500)
    deltas = report.loss.deltas(epsilons)
    shown = deltas <= most
    axes.plot(deltas[shown], epsilons[shown], color="C0", linewidth=2)
    if math.isfinite(report.epsilon):
        axes.plot([report.delta], [report.epsilon], "o", color="C0")
        text = f"ε = {round_up(report.epsilon)} at δ = {report.delta:.2g}"
        axes.annotate(text, (report.delta, report.epsilon), (8, 6), textcoords="offset points")
    axes.axvline(1 / report.num_units, color="0.6", linestyle=":")
    axes.annotate(
        f"1 / number of {report.unit}s",
        (1 / report.num_units, axes.get_ylim()[1]),
        (4, -12),
        textcoords="offset points",
        color="0.4",
        fontsize=8,
    )
    axes.set(xscale="log", xlim=(least / 2, 2 * most), ylim=(0, None))
    axes.set_xlabel("δ")
    axes.set_ylabel("ε")
    axes.set_title(f"The guarantee after {report.steps_done:,} of {report.steps_planned:,} steps")
