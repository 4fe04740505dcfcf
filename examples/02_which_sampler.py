"""Which sampler, which epsilon: the privacy cost of one run under each sampler.

    python examples/02_which_sampler.py

The same data, batch size, steps and noise cost very different epsilons. What differs is how batches
are drawn. The less anyone knows about who is in a batch, the less a step reveals. If you account
one sampler and run another, the number means nothing.
"""

import argparse
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from dpoptax import samplers
from dpoptax.accounting import epsilon

NUM_EXAMPLES, BATCH_SIZE, EPOCHS, DELTA = 60_000, 128, 20, 1e-5
STEPS = EPOCHS * -(-NUM_EXAMPLES // BATCH_SIZE)

# The sampler, and the neighbouring relation of the guarantee.
SAMPLERS = {
    "Poisson": (samplers.Poisson(NUM_EXAMPLES, BATCH_SIZE), "add_or_remove_one"),
    "Poisson, replace one": (samplers.Poisson(NUM_EXAMPLES, BATCH_SIZE), "replace_one"),
    "cyclic Poisson, 10 groups": (
        samplers.CyclicPoisson(NUM_EXAMPLES, BATCH_SIZE, 10),
        "replace_special",
    ),
    "fixed size": (samplers.FixedSize(NUM_EXAMPLES, BATCH_SIZE), "add_or_remove_one"),
    "balls in bins": (
        samplers.BallsInBins(NUM_EXAMPLES, STEPS // EPOCHS),
        "add_or_remove_one",
    ),
    "shuffled epochs": (samplers.Shuffled(NUM_EXAMPLES, BATCH_SIZE), "replace_special"),
}


def cost(name: str, noise_multiplier: float) -> float:
    """Returns the epsilon of the whole run under one sampler."""
    sampler, relation = SAMPLERS[name]
    run = {"noise_multiplier": noise_multiplier, "num_steps": STEPS, "delta": DELTA}
    return epsilon(sampler=sampler, relation=relation, **run)


def main() -> None:
    """Prints the table and draws the curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--noise-multiplier", type=float, default=1.1)
    parser.add_argument(
        "--curve",
        type=float,
        nargs="+",
        default=[0.8, 1.6, 3.2, 6.4],
        help="noise multipliers in the figure",
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    options = parser.parse_args()
    print(
        f"{NUM_EXAMPLES} examples, batches of {BATCH_SIZE}, {STEPS} steps, "
        f"noise multiplier {options.noise_multiplier:g}, delta {DELTA:g}\n"
    )
    for name in SAMPLERS:
        print(f"  {name:<28} epsilon = {cost(name, options.noise_multiplier):6.2f}", flush=True)

    noises = options.curve
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name in SAMPLERS:
        # Balls in bins lie just below Poisson.
        style = "--" if name == "balls in bins" else "-"
        axes.plot(noises, [cost(name, noise) for noise in noises], style, marker="o", label=name)
    axes.set(
        xscale="log", yscale="log", xlabel="noise multiplier", ylabel="epsilon",
        title=f"One run, six ways to draw batches (delta {DELTA:g})",
        xticks=noises, xticklabels=[f"{noise:g}" for noise in noises],
    )  # fmt: skip
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "which_sampler.png"
    figure.savefig(path, dpi=120)
    print(f"\nThe same run at other noise multipliers: {path}")


if __name__ == "__main__":
    main()
