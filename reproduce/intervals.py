"""How often private intervals cover, over epsilon and clip: the table and picture of the page.

    python -m reproduce.intervals                 # all runs; about an hour on two cores
    python -m reproduce.intervals --match "own, epsilon 1"
    python -m reproduce.intervals --out docs      # missing runs only, and the picture

The records are in `intervals.json` of the folder. A run with a record is not repeated.
"""

import argparse
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import autoguide

from dpoptax import Plan, vi
from dpoptax.vi import guides
from dpoptax.vi.models import logistic_regression
from dpoptax.vi.numpyro import aligned_numpyro_elbo
from reproduce import runs

ROOT = pathlib.Path(__file__).parents[1]
N, STEPS, KEPT = 2000, 800, 600
EPSILONS = (1.0, 4.0)
CLIPS = (1.0, 2.0, 3.0)
AUTOGUIDES = ("AutoNormal", "AutoMultivariateNormal")


def covariates(key: jax.Array) -> jax.Array:
    """Returns the inputs of one example."""
    return jax.random.normal(key, (5,))


def simulate(key: jax.Array, latents: Any) -> tuple[jax.Array, jax.Array]:
    """Returns one example of the logistic regression."""
    x_key, y_key = jax.random.split(key)
    x = covariates(x_key)
    logit = x @ latents["weights"] + latents["bias"]
    return x, jax.random.bernoulli(y_key, jax.nn.sigmoid(logit)).astype(jnp.float32)


def own() -> tuple[Any, Any]:
    """Returns the objective with a guide of dpoptax, and `simulate`."""
    latents = {"weights": jnp.zeros(5), "bias": jnp.zeros(())}
    guide = guides.MeanField(latents)
    elbo = vi.aligned_elbo(guide, logistic_regression, 1.0, num_examples=N, keep_steps=KEPT)
    return elbo, simulate


def through_numpyro(name: str) -> tuple[Any, Any]:
    """Returns the objective with an autoguide of NumPyro, and `simulate`."""

    def model(x: jax.Array, y: jax.Array | None = None) -> None:
        bias = numpyro.sample("bias", dist.Normal(0, 1))
        weights = numpyro.sample("weights", dist.Normal(0, 1).expand([5]).to_event(1))
        with numpyro.plate("data", N, subsample_size=len(x)):
            numpyro.sample("y", dist.Bernoulli(logits=x @ weights + bias), obs=y)

    elbo = aligned_numpyro_elbo(
        model, getattr(autoguide, name)(model), jnp.zeros((N, 5)), jnp.zeros(N, jnp.int32),
        num_examples=N, keep_steps=KEPT, init_key=jax.random.key(3),
    )  # fmt: skip
    return elbo, elbo.simulator(lambda key: (covariates(key), None))


def hierarchical() -> tuple[Any, Any]:
    """Returns the objective for five slopes and ten groups of unknown scale, and `simulate`."""

    def model(x: jax.Array, group: jax.Array, y: jax.Array | None = None) -> None:
        slopes = numpyro.sample("slopes", dist.Normal(0, 1).expand([5]).to_event(1))
        scale = numpyro.sample("scale", dist.LogNormal(-0.5, 0.5))
        with numpyro.plate("groups", 10):
            effects = numpyro.sample("effects", dist.Normal(0, scale))
        with numpyro.plate("data", N, subsample_size=len(x)):
            numpyro.sample("y", dist.Bernoulli(logits=x @ slopes + effects[group]), obs=y)

    rows = jnp.zeros(N, jnp.int32)
    elbo = aligned_numpyro_elbo(
        model, autoguide.AutoNormal(model), jnp.zeros((N, 5)), rows, rows,
        num_examples=N, keep_steps=KEPT, init_key=jax.random.key(3),
    )  # fmt: skip

    def arguments(key: jax.Array) -> tuple[Any, ...]:
        x_key, group_key = jax.random.split(key)
        return covariates(x_key), jax.random.randint(group_key, (), 0, 10), None

    return elbo, elbo.simulator(arguments)


def check(make: Any, epsilon: float, clip: float | None, num_worlds: int, seed: int) -> runs.Record:
    """Returns coverage and widths of one plan; without a clip, that of `choose_clip`."""
    elbo, draw_example = make()
    plan = Plan.calibrate(
        num_examples=N, expected_batch_size=N / 10, clip=clip or 1.0, num_steps=STEPS,
        epsilon=epsilon, delta=1e-5,
    )  # fmt: skip
    if clip is None:
        choice = vi.choose_clip(elbo, plan, draw_example, key=jax.random.key(0))
        plan = plan.replace(clip=choice.clip)
    found = vi.calibration_check(
        elbo, plan, optax.adam(0.01), draw_example, num_worlds=num_worlds,
        key=jax.random.key(seed),
    )  # fmt: skip
    return {
        "epsilon": epsilon,
        "clip": float(plan.clip.l2_clip),
        "coverage": found.coverage,
        "standard_error": found.standard_error,
        "guide_coverage": found.guide_coverage,
        "width_ratio": found.width_ratio,
        "privacy_ratio": found.privacy_ratio,
        "clip_bias": found.clip_bias,
        "worlds": num_worlds,
        "seed": seed,
    }


def all_runs(num_worlds: int, seed: int) -> list[runs.Run]:
    """Returns the runs of the page."""
    makers = {"own": own}
    makers |= {name: functools.partial(through_numpyro, name) for name in AUTOGUIDES}
    makers |= {"hierarchical": hierarchical}
    chosen = [(name, eps, None) for name in makers for eps in EPSILONS]
    chosen += [("own", eps, clip) for eps in EPSILONS for clip in CLIPS]
    return [
        runs.Run(
            f"{name}, epsilon {eps:g}, clip {clip or 'chosen'}",
            300,
            functools.partial(check, makers[name], eps, clip, num_worlds, seed),
        )
        for name, eps, clip in chosen
    ]


def picture(records: dict[str, runs.Record], path: pathlib.Path) -> None:
    """Draws coverage over the clip bound, one line per epsilon, with the chosen bound."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for epsilon, color in zip(EPSILONS, ("tab:blue", "tab:orange"), strict=True):
        found = [
            record
            for name, record in records.items()
            if name.startswith("own") and record["epsilon"] == epsilon
        ]
        found.sort(key=lambda record: record["clip"])
        clips = [record["clip"] for record in found]
        for key, style in (("coverage", "o-"), ("guide_coverage", "x:")):
            label = "calibrated" if key == "coverage" else "the guide's own"
            axes.plot(
                clips, [record[key] for record in found], style, color=color,
                label=f"{label}, epsilon {epsilon:g}",
            )  # fmt: skip
    axes.axhspan(0.86, 0.94, color="0.9")
    axes.set(xlabel="clip bound", ylabel="coverage of 90 % intervals", ylim=(0, 1))
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Parses the command line, runs what is missing, and draws."""
    parser = argparse.ArgumentParser(prog="reproduce.intervals", description=__doc__.split("\n")[0])
    parser.add_argument("--worlds", type=int, default=40, help="simulated data sets per run [40]")
    parser.add_argument("--seed", type=int, default=2, help="of the simulated data sets [2]")
    parser.add_argument("--match", default="", metavar="TEXT", help="runs with this in their names")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "out",
                        help="a folder for records and the picture [out]")  # fmt: skip
    options = parser.parse_args()
    chosen = [run for run in all_runs(options.worlds, options.seed) if options.match in run.name]
    # NumPyro and Optax mix integers and floats.
    with jax.numpy_dtype_promotion("standard"):
        records = runs.run_all(chosen, options.out / "intervals.json")
    picture(records, options.out / "intervals.png")
    for name, record in records.items():
        print(
            f"{name}: cover {record['coverage']:.3f} (se {record['standard_error']:.3f}, guide "
            f"{record['guide_coverage']:.2f}), width {record['width_ratio']:.2f} of the needed, "
            f"{record['privacy_ratio']:.2f} of that without privacy"
        )


if __name__ == "__main__":
    main()
