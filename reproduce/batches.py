"""The cost of a batch: its size, and how it is drawn.

Seconds per epoch of the MNIST VAE by batch size, private and not private, and microseconds per
batch of 128 for a Feistel permutation and `jax.random.choice` (arXiv:2103.11648, section 4). Times
are medians over interleaved rounds on this machine.
"""

import functools
import statistics
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import epoch, results
from benchmarks.timing import compiled, interleaved
from dpoptax.samplers._feistel import permute
from reproduce.runs import Record, Run

BATCHES = (64, 128, 256, 512, 1024)
POPULATIONS = (10_000, 60_000, 1_000_000)
KEYS = {"default keys": "threefry", "secure keys": "chacha8"}
RATIOS = (
    ("private", "same batches"),
    ("private", "not private"),
    ("private, fixed size", "not private"),
)
ROUNDS, DRAWN = 7, 128


def seconds_per_epoch(batch: int, generator: str) -> Record:
    """Seconds per epoch, private and not, and their ratios."""
    found = epoch.cells(batch, rounds=ROUNDS, steps=40, generator=generator)
    ratios = {f"{name} / {base}": results.ratio(found, name, base) for name, base in RATIOS}
    return {name: results.median(cell) for name, cell in found.items()} | ratios


def microseconds_per_batch(population: int) -> Record:
    """Microseconds for the indices of one batch, without replacement."""
    key = jax.random.key(0)

    def feistel(key: Any) -> Any:
        return permute(key, jnp.arange(DRAWN, dtype=jnp.int32), population)

    def choice(key: Any) -> Any:
        return jax.random.choice(key, population, (DRAWN,), replace=False)

    programs = {"Feistel": (feistel, key), "choice": (choice, key)}
    ready = {
        name: compiled(function, (argument,))[0] for name, (function, argument) in programs.items()
    }
    readings = interleaved(ready, ROUNDS)
    return {name: 1e6 * statistics.median(times) for name, times in readings.items()}


def runs(seeds: tuple[int, ...]) -> Iterator[Run]:
    """All runs of this part; times have no seeds."""
    del seeds
    for keys, generator in KEYS.items():
        for batch in BATCHES:
            compute = functools.partial(seconds_per_epoch, batch, generator)
            yield Run(f"batches: {keys}, size {batch}", 60, compute)
    for population in POPULATIONS:
        compute = functools.partial(microseconds_per_batch, population)
        yield Run(f"batches: of {population}", 10, compute)
