"""Times ChaCha and JAX's default PRNG: normals, keys, and a whole private step.

    python -m benchmarks.randomness --rounds 15 --out results.json

Each round times all programs one after the other. Printed numbers are medians over rounds, and
ratios to JAX's default PRNG.
"""

import argparse
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import dpoptax
from benchmarks import results
from benchmarks.models import workload
from benchmarks.peers import jax_steps
from benchmarks.timing import Program, compiled, interleaved
from dpoptax import mechanisms
from dpoptax.per_example._stacked import as_per_example_grads

BATCH = 128
# As many as the VAE of the d3p paper has parameters.
NORMALS = 688_884
KEYS = {
    "threefry": lambda: jax.random.key(0),
    "chacha8": lambda: dpoptax.random.insecure_key(0, rounds=8),
    "chacha12": lambda: dpoptax.random.insecure_key(0, rounds=12),
    "chacha20": lambda: dpoptax.random.insecure_key(0, rounds=20),
}


def noise(mechanism: Any) -> Callable[..., Any]:
    """The release of one small example with the parameters of the VAE."""

    def release(key: Any) -> Any:
        grads = as_per_example_grads(jnp.zeros((1, NORMALS)))
        return mechanism.release(key, grads, dpoptax.clipping.FlatClip(1.0), 1.0, 0)

    return release


def vae_step(key: Any) -> Program:
    """Sampling, gradients, clipping, noise and Adam for one batch of the VAE."""
    work = workload("vae", BATCH)
    keys = dpoptax.random.split_by_purpose(key)
    sampler = dpoptax.samplers.Poisson(60_000, BATCH)
    tx = optax.chain(
        dpoptax.privatize(1.0, 1.0, expected_batch_size=BATCH, key=keys.noise_key), optax.adam(1e-3)
    )
    train, state = jax_steps.applied(*jax_steps.ours(work, tx))

    def step(sampler_state: Any, *arguments: Any) -> Any:
        sampler_state, _ = sampler.sample(sampler_state)
        return sampler_state, train(*arguments)

    return step, (sampler.init(keys.sampling_key), work.params, state, work.examples)


def programs(generator: str) -> dict[str, Program]:
    """What is timed of a generator, not yet compiled."""
    make = KEYS[generator]
    return {
        f"{NORMALS:,} normals": (lambda key: jax.random.normal(key, (NORMALS,)), (make(),)),
        f"{NORMALS:,} words": (lambda key: jax.random.bits(key, (NORMALS,)), (make(),)),
        "noise of a release": (noise(mechanisms.Gaussian()), (make(),)),
        "four normals": (noise(mechanisms.Gaussian(num_draws=4)), (make(),)),
        "exact noise": (noise(mechanisms.DiscreteGaussian()), (make(),)),
        "1,000 keys": (lambda key: jax.random.split(key, 1000), (make(),)),
        "VAE private step": vae_step(make()),
    }


def cells_of(name: str, rounds: int) -> results.Cells:
    """Readings by every generator."""
    ready: dict[str, Program] = {}
    cells: results.Cells = {}
    for generator in KEYS:
        ready[generator], cells[generator] = compiled(*programs(generator)[name])
    for generator, seconds in interleaved(ready, rounds).items():
        cells[generator]["seconds"] = seconds
    return cells


def main() -> None:
    """Measures, prints a table, and writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file; what it holds is kept")
    options = parser.parse_args()
    names = programs("threefry")
    results.study(
        {name: functools.partial(cells_of, name, options.rounds) for name in names}, options.out
    )


if __name__ == "__main__":
    main()
