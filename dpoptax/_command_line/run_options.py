"""Options that describe a run, which several commands share."""

import argparse
from collections.abc import Callable
from typing import Any

from dpoptax import samplers
from dpoptax.samplers import Sampler


def _whole(size: float) -> float:
    # A fraction stays one, so that the sampler refuses it.
    return int(size) if float(size).is_integer() else size


# From a number of examples and a batch size to a sampler.
SAMPLERS: dict[str, Callable[[int, Any], Sampler]] = {
    "poisson": samplers.Poisson,
    "fixed-size": lambda num_examples, size: samplers.FixedSize(num_examples, _whole(size)),
    "shuffled": lambda num_examples, size: samplers.Shuffled(num_examples, _whole(size)),
}


def add_run_options(
    parser: argparse.ArgumentParser, *, required: bool, needs_num_examples: bool = True
) -> None:
    """Adds the arguments that describe a run."""
    parser.add_argument(
        "--num-examples",
        type=int,
        required=needs_num_examples,
        metavar="N",
        help="how many examples the training data have",
    )
    parser.add_argument(
        "--batch-size",
        type=float,
        required=required,
        metavar="B",
        help="how many examples a batch has on average; not a sampling rate",
    )
    parser.add_argument(
        "--noise-multiplier",
        type=float,
        required=required,
        metavar="S",
        help="standard deviation of the noise on the sum, divided by the clip bound",
    )
    length = parser.add_mutually_exclusive_group(required=required)
    length.add_argument("--steps", type=int, metavar="T", help="how many steps the run has")
    length.add_argument(
        "--epochs",
        type=float,
        metavar="E",
        help="how many passes over the data, in place of --steps: T = ceil(E N / B)",
    )
    parser.add_argument(
        "--sampler",
        choices=list(SAMPLERS),
        default="poisson",
        help="how batches are drawn; default poisson, where each example joins a batch "
        "independently",
    )
