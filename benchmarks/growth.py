"""Times gradients as one size grows: parameters, sequence length, or batch.

    python -m benchmarks.growth --out results.json

A dense network of three layers grows in width, a transformer block in length, and the VAE of d3p in
its batch (arXiv:2103.11648, Figure 3). The forms are those of `benchmarks.step_time`.
"""

import argparse
import functools
import pathlib
from collections.abc import Callable

import flax.linen as nn
import jax

from benchmarks import results
from benchmarks.models import Workload, bare, workload
from benchmarks.step_time import measure

WIDTHS = (32, 128, 512, 2048)
LENGTHS = (16, 64, 256, 1024)
BATCHES = (16, 32, 64, 128, 256, 512, 1024)
# The per-example gradients may take this many MiB.
MOST_STACKED_MIB = 4096


class Dense(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.relu(nn.Dense(self.width)(nn.relu(nn.Dense(self.width)(x)))))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x))
        return x + nn.Dense(64)(nn.gelu(nn.Dense(256)(nn.LayerNorm()(x))))


def of_model(model: nn.Module, *shape: int) -> Workload:
    """A model, and a batch of random numbers of that shape."""
    return bare(model, jax.random.normal(jax.random.key(0), shape))


def cells_of(make: Callable[[], Workload], batch: int, rounds: int) -> results.Cells:
    """Leaves out the gradients of every example where they take too much memory."""
    work = make()
    size = 4 * batch * sum(leaf.size for leaf in jax.tree.leaves(work.params)) / 2**20
    forms = ("plain", "factored") + (("stacked",) if size <= MOST_STACKED_MIB else ())
    return measure(work, rounds, forms)


def main() -> None:
    """Measures, prints a table, and writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file; what it holds is kept")
    options = parser.parse_args()
    points: dict[str, tuple[Callable[[], Workload], int]] = {}
    for width in WIDTHS:
        points[f"width, {width}"] = (functools.partial(of_model, Dense(width), 128, 256), 128)
    for length in LENGTHS:
        points[f"length, {length}"] = (functools.partial(of_model, Block(), 16, length, 64), 16)
    for batch in BATCHES:
        points[f"batch, {batch}"] = (functools.partial(workload, "vae", batch), batch)
    results.study(
        {
            name: functools.partial(cells_of, make, batch, options.rounds)
            for name, (make, batch) in points.items()
        },
        options.out,
    )


if __name__ == "__main__":
    main()
