"""Draws the figure of docs/correlated_noise.md and prints its tables.

    python tools/draw_correlated.py docs/images

It calibrates about sixty plans, which takes some minutes on two cores.
"""

import pathlib
import sys

import matplotlib.ticker
import numpy as np
from matplotlib.figure import Figure

import dpoptax
from dpoptax.mechanisms import Correlated
from dpoptax.mechanisms.strategies import (
    BandedInverse,
    BandedToeplitz,
    BufferedToeplitz,
    Separated,
    prefix_sum_error,
    sensitivity,
)

RUN = {"num_examples": 60_000, "clip": 1.0, "epochs": 20, "delta": 1e-5}
BATCHES = {256: "#d1495b", 1024: "#30638e", 4096: "#edae49"}
TABLE = (1.0, 2.0, 4.0, 8.0, 16.0)


def main(folder: pathlib.Path) -> None:
    """Draws the figure into a folder, and prints the tables."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axis = figure.subplots()
    for batch, colour in BATCHES.items():
        ratios = []
        for epsilon in TABLE:
            ordinary, plan = plans(batch, epsilon)
            before, after = error(ordinary), error(plan)
            ratios.append(after / before)
            print(
                f"| {batch:,} | {epsilon:g} | {num_bands(plan)} | {before:.1f} | {after:.1f} | "
                f"{after / before:.2f} |",
                flush=True,
            )
        axis.plot(TABLE, ratios, "o-", color=colour, label=f"batches of {batch:,}")
    axis.axhline(1.0, color="0.6", linewidth=1)
    axis.set(xscale="log", xlabel="epsilon", ylim=(0, 1.05))
    axis.set_xticks(TABLE)
    axis.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axis.set_ylabel("noise in the parameters,\ncorrelated / independent")
    axis.set_title("20 epochs of 60,000 examples, delta 1e-05, at most 16 bands", loc="left")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "correlated_noise.png", dpi=150)
    print_unamplified()


def plans(batch: float, epsilon: float) -> tuple[dpoptax.Plan, dpoptax.Plan]:
    """The plan with independent noise, and the one that chooses the number of bands."""
    settings = RUN | {"expected_batch_size": batch, "epsilon": epsilon}
    return dpoptax.Plan.calibrate(**settings), dpoptax.correlated_plan(**settings)


def num_bands(plan: dpoptax.Plan) -> int:
    """The number of bands, which is one for independent noise."""
    return plan.mechanism.strategy.num_bands if isinstance(plan.mechanism, Correlated) else 1


def error(plan: dpoptax.Plan) -> float:
    """Root mean squared error of the prefix sums, in clip bounds."""
    strategy = BandedToeplitz((1.0,), plan.num_steps)
    if isinstance(plan.mechanism, Correlated):
        strategy = plan.mechanism.strategy
    return float(np.asarray(plan.noise_multiplier) * prefix_sum_error(strategy))


def print_unamplified() -> None:
    """Prints errors times sensitivities of the kinds of strategies, for known participations."""
    steps, separation = 1172, 58
    pattern = Separated(separation)
    strategies = {
        "independent": BandedToeplitz((1.0,), steps),
        "banded, 16": BandedToeplitz.optimal(16, steps),
        "banded, 58": BandedToeplitz.optimal(58, steps),
        "square root inverse, 8": BandedInverse.square_root(8, steps),
        "best inverse, 2": BandedInverse.optimal(2, steps, separation=separation),
        "best inverse, 8": BandedInverse.optimal(8, steps, separation=separation),
        "best buffers, 4": BufferedToeplitz.optimal(4, steps, separation=separation),
    }
    for name, strategy in strategies.items():
        print(f"| {name} | {prefix_sum_error(strategy) * sensitivity(strategy, pattern):.1f} |")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
