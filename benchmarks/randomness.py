"""Times ChaCha20 beside JAX's default generator: normals, keys, and a whole private step.

    python -m benchmarks.randomness --rounds 15 --out results.json

Every round times all programs one after the other; what is printed are medians over rounds, and
ratios of the two generators.
"""

import argparse
import json
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import dpoptax
from benchmarks.models import workload
from benchmarks.step_time import READING_SECONDS, read
from dpoptax import mechanisms
from dpoptax.per_example import as_per_example_grads

BATCH = 128
# As many as the VAE of the d3p paper has parameters.
NORMALS = 688_884
KEYS = {
    "threefry": lambda: jax.random.key(0),
    "chacha20": lambda: dpoptax.random.test_key(0),
}


def noise(mechanism: Any) -> Callable[..., Any]:
    """The release of one small example with the parameters of the VAE."""

    def release(key: Any) -> Any:
        grads = as_per_example_grads(jnp.zeros((1, NORMALS)))
        return mechanism.release(key, grads, dpoptax.clipping.flat(1.0), 1.0, 0)

    return release


def vae_step(key: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Sampling, gradients, clipping, noise and Adam for one batch of the VAE."""
    work = workload("vae", BATCH)
    keys = dpoptax.random.split_by_purpose(key)
    sampler = dpoptax.samplers.Poisson(60_000, BATCH)
    tx = optax.chain(dpoptax.privatize(1.0, 1.0, BATCH, keys.noise_key), optax.adam(1e-3))
    grads_fn = dpoptax.per_example_grads(work.loss_fn)

    def step(params: Any, state: Any, sampler_state: Any, examples: Any) -> Any:
        sampler_state, _ = sampler.sample(sampler_state)
        grads = grads_fn(params, examples, key=work.key)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, sampler_state

    state = sampler.init(keys.sampling_key)
    return step, (work.params, tx.init(work.params), state, work.examples)


def main() -> None:
    """Measures, prints a table, and writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file")
    options = parser.parse_args()
    compiled, compile_seconds = {}, {}
    for generator, make in KEYS.items():
        for name, (function, arguments) in {
            f"{NORMALS:,} normals": (lambda key: jax.random.normal(key, (NORMALS,)), (make(),)),
            f"{NORMALS:,} words": (lambda key: jax.random.bits(key, (NORMALS,)), (make(),)),
            "four normals": (noise(mechanisms.floating_point(num_normals=4)), (make(),)),
            "exact noise": (noise(mechanisms.exact()), (make(),)),
            "1,000 keys": (lambda key: jax.random.split(key, 1000), (make(),)),
            "VAE private step": vae_step(make()),
        }.items():
            lowered = jax.jit(function).lower(*arguments)
            began = time.perf_counter()
            compiled[name, generator] = (lowered.compile(), arguments)
            compile_seconds[name, generator] = time.perf_counter() - began
    repeats = {}
    for case, (function, arguments) in compiled.items():
        jax.block_until_ready(function(*arguments))
        repeats[case] = max(1, int(READING_SECONDS / read(function, arguments, 1)))
    readings: dict[tuple[str, str], list[float]] = {case: [] for case in compiled}
    for _ in range(options.rounds):
        for case, (function, arguments) in compiled.items():
            readings[case].append(1e3 * read(function, arguments, repeats[case]))
    medians = {case: statistics.median(times) for case, times in readings.items()}
    device = jax.devices()[0].device_kind
    print(f"{device}, {platform.machine()}, JAX {jax.__version__}: ms, and seconds to compile")
    names = dict.fromkeys(name for name, _ in compiled)
    for name in names:
        one, two = (medians[name, generator] for generator in KEYS)
        built, rebuilt = (compile_seconds[name, generator] for generator in KEYS)
        print(
            f"{name:20} threefry {one:8.2f} ({built:.1f} s)  "
            f"chacha20 {two:8.2f} ({rebuilt:.1f} s)  ratio {two / one:.2f}"
        )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        record = {"device": device, "milliseconds": {", ".join(c): m for c, m in medians.items()}}
        options.out.write_text(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
