"""Finds the largest batch whose training step keeps to a memory limit, as the compiler states it.

    python -m benchmarks.largest_batch --gib 12 --out results.json

After Table 4 of arXiv:2010.09063, for which a GPU of 12 GB stood. Programs are compiled and not
run. Arguments, results and temporary memory count; from powers of two, to within a sixteenth.
"""

import argparse
import functools
import pathlib

import jax

from benchmarks import results
from benchmarks.models import Workload, workload
from benchmarks.peers.jax_steps import step_of

MODELS = ("mnist", "cifar", "lstm", "vae")
PEERS = ("jax", "dpoptax", "vmap")
LARGEST = 1 << 20


def gib(peer: str, work: Workload, batch: int) -> float:
    """Memory of a step."""
    examples = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((batch, *leaf.shape[1:]), leaf.dtype), work.examples
    )
    step, state = step_of(peer, work, batch)
    found = jax.jit(step).lower(work.params, state, examples).compile().memory_analysis()
    sizes = (
        found.argument_size_in_bytes,
        found.output_size_in_bytes,
        found.temp_size_in_bytes,
        -found.alias_size_in_bytes,
    )
    return sum(sizes) / 2**30


def largest(peer: str, work: Workload, limit: float) -> int:
    """Doubles until it does not fit, then halves the distance four times."""
    low, high = 0, 16
    while high <= LARGEST and gib(peer, work, high) <= limit:
        low, high = high, 2 * high
    if low == 0 or high > LARGEST:
        return low
    for _ in range(4):
        middle = (low + high) // 2
        if gib(peer, work, middle) <= limit:
            low = middle
        else:
            high = middle
    return low


def main() -> None:
    """Searches, prints a table, and writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=12.0)
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file; what it holds is kept")
    options = parser.parse_args()

    def cells(model: str) -> results.Cells:
        work = workload(model, 2)
        return {peer: {"batch": largest(peer, work, options.gib)} for peer in PEERS}

    results.study(
        {f"{model}, {options.gib:g} GiB": functools.partial(cells, model) for model in MODELS},
        options.out,
    )


if __name__ == "__main__":
    main()
