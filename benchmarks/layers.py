"""Times one layer of each kind, as in Figure 3 of Opacus.

    python -m benchmarks.layers --batch 128 --out results.json

Measures gradients only, in the forms of `benchmarks.step_time` (arXiv:2109.12298, section 4.2).
"""

import argparse
import functools
import pathlib

import flax.linen as nn
import jax

from benchmarks import results
from benchmarks.models import Workload, bare
from benchmarks.step_time import measure

# A layer, and the shape of an example; ids where the vocabulary is given.
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...], int | None]] = {
    "dense, 512 to 512": (nn.Dense(512), (512,), None),
    "dense over 128 positions": (nn.Dense(128), (128, 128), None),
    "convolution, 32 to 32, 32 x 32": (nn.Conv(32, (3, 3)), (32, 32, 32), None),
    "convolution, 128 to 128, 8 x 8": (nn.Conv(128, (3, 3)), (8, 8, 128), None),
    "convolution over time, 64 to 64": (nn.Conv(64, (5,)), (128, 64), None),
    "embedding of 10,000": (nn.Embed(10_000, 64), (128,), 10_000),
    "layer norm": (nn.LayerNorm(), (128, 256), None),
    "group norm": (nn.GroupNorm(8), (16, 16, 64), None),
    "LSTM of 100": (nn.RNN(nn.LSTMCell(100)), (128, 100), None),
    "GRU of 100": (nn.RNN(nn.GRUCell(100)), (128, 100), None),
    "attention, 4 heads of 32": (nn.MultiHeadDotProductAttention(4), (128, 128), None),
}


def workload_of(name: str, batch: int) -> Workload:
    """A layer, and a batch of random numbers or ids."""
    layer, shape, vocabulary = LAYERS[name]
    key = jax.random.key(0)
    if vocabulary is None:
        x = jax.random.normal(key, (batch, *shape))
    else:
        x = jax.random.randint(key, (batch, *shape), 0, vocabulary)
    return bare(layer, x)


def main() -> None:
    """Measures, prints a table, and writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file; what it holds is kept")
    options = parser.parse_args()

    def cells(name: str) -> results.Cells:
        return measure(workload_of(name, options.batch), options.rounds)

    results.study({name: functools.partial(cells, name) for name in LAYERS}, options.out)


if __name__ == "__main__":
    main()
