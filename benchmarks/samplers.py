"""Times a batch of Poisson and FixedSize by the number of examples, and of alternatives.

    python -m benchmarks.samplers --rounds 9 --out results.json

Each round times all programs one after the other. Printed numbers are medians over rounds. The
alternatives are `jax.random.choice(replace=False)` and `jax.random.permutation`. The training step
of the VAE is measured for comparison.
"""

import argparse
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import optax

import dpoptax
from benchmarks import results
from benchmarks.models import workload
from benchmarks.peers import jax_steps
from benchmarks.timing import Program, compiled, interleaved

BATCH = 128
SIZES = (10**4, 60_000, 10**6, 10**9)
# Rivals hold arrays of the length of the data.
LARGEST_RIVAL = 10**6


def programs() -> dict[str, Program]:
    """Compiled programs and their arguments, by what they are."""
    found: dict[str, Program] = {}

    def add(name: str, function: Callable[..., Any], *arguments: Any) -> None:
        found[name], _ = compiled(function, arguments)

    key, secure = jax.random.key(0), dpoptax.random.insecure_key(0)
    for size in SIZES:
        for sampler in (
            dpoptax.samplers.Poisson(size, BATCH),
            dpoptax.samplers.FixedSize(size, BATCH),
        ):
            name = f"{type(sampler).__name__}, {size:,}"
            add(name, sampler.sample, sampler.init(key))
            add(f"{name}, ChaCha", sampler.sample, sampler.init(secure))
        if size <= LARGEST_RIVAL:

            def choice(key: Any, size: int = size) -> Any:
                return jax.random.choice(key, size, (BATCH,), replace=False)

            def permutation(key: Any, size: int = size) -> Any:
                return jax.random.permutation(key, size)[:BATCH]

            add(f"random.choice, {size:,}", choice, key)
            add(f"random.permutation, {size:,}", permutation, key)
    found["VAE training step"] = training_step()
    return found


def training_step() -> Program:
    """Gradients, clipping, noise and Adam for one batch of the VAE."""
    work = workload("vae", BATCH)
    tx = optax.chain(
        dpoptax.privatize(1.0, 1.0, expected_batch_size=BATCH, key=jax.random.key(1)),
        optax.adam(1e-3),
    )
    step, state = jax_steps.applied(*jax_steps.ours(work, tx))
    return compiled(step, (work.params, state, work.examples))[0]


def main() -> None:
    """Measures, prints a table, and writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file; what it holds is kept")
    options = parser.parse_args()

    def cells() -> results.Cells:
        readings = interleaved(programs(), options.rounds)
        return {name: {"seconds": seconds} for name, seconds in readings.items()}

    results.study({f"batch of {BATCH}": cells}, options.out)


if __name__ == "__main__":
    main()
