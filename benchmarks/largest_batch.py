"""Finds the largest batch whose training step stays within a memory limit.

    python -m benchmarks.largest_batch --gib 12 --out results.json

As in Table 4 of arXiv:2010.09063, which used a GPU with 12 GB. Programs are compiled but not run.
The compiler reports the memory for arguments, results and temporary values. The search is accurate
to one sixteenth.
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
    """Closes in from both sides; memory grows nearly in proportion to the batch."""
    low, high = 0, LARGEST
    known: list[tuple[float, int]] = []
    guesses = [64, 128]
    while high - low > max(low // 16, 1):
        batch = guesses.pop(0) if guesses else (low + high) // 2
        if not low < batch < high:
            continue
        known.append((gib(peer, work, batch), batch))
        low, high = (batch, high) if known[-1][0] <= limit else (low, batch)
        if len(known) == 2:
            (used, first), (more, second) = known
            predicted = first + (limit - used) * (second - first) / max(more - used, 1e-9)
            guesses = [int(predicted * (1 + share)) for share in (-1 / 40, 1 / 40, -1 / 8, 1 / 8)]
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
