"""Command-line options that the examples share, and one-line errors."""

import argparse
import contextlib
import secrets
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn

import jax

import dpoptax


class Defaults(NamedTuple):
    """The default values of the numeric options for one data set."""

    epochs: float
    batch_size: float
    epsilon: float
    delta: float
    l2_clip: float
    learning_rate: float


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors take one line."""

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits with code 2."""
        self.exit(2, f"error: {message}\n")


def training_parser(description: str, defaults: Mapping[str, Defaults]) -> Parser:
    """Returns a parser with the options of a private training run.

    Args:
        description: what the example does, for --help.
        defaults: for each data set; the first one is the default data set.
    """

    def number(group: argparse._ActionsContainer, name: str, meaning: str) -> None:
        field = name.strip("-").replace("-", "_")
        shown = ", ".join(f"{key} {getattr(row, field):g}" for key, row in defaults.items())
        group.add_argument(name, type=float, metavar="NUMBER", help=f"{meaning} [{shown}]")

    parser = Parser(description=description)
    parser.add_argument("--dataset", choices=list(defaults), default=next(iter(defaults)))
    length = parser.add_mutually_exclusive_group()
    number(length, "--epochs", "passes over the data, on average")
    length.add_argument("--steps", type=int, metavar="NUMBER", help="in place of --epochs")
    number(parser, "--batch-size", "expected size of a Poisson batch")
    number(parser, "--epsilon", "the privacy budget, under add or remove one example")
    number(parser, "--delta", "well below 1 / number of training examples")
    number(parser, "--l2-clip", "bound on the gradient norm of one example")
    number(parser, "--learning-rate", "of the optimizer")
    parser.add_argument(
        "--seed",
        type=int,
        metavar="NUMBER",
        help="repeats a run. The guarantee then holds only if nobody knows the seed. Without a "
        "seed, the random key comes from the operating system",
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the figure [out]")
    parser.add_argument("--quiet", action="store_true", help="show no progress bars")
    return parser


def parse(parser: Parser, defaults: Mapping[str, Defaults]) -> argparse.Namespace:
    """Returns the options of this run, with the defaults of its data set filled in."""
    options = parser.parse_args()
    for name, value in defaults[options.dataset]._asdict().items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.steps is not None:
        options.epochs = None
    if not 0 < options.learning_rate < float("inf"):
        parser.error(f"--learning-rate must be positive and finite; got {options.learning_rate}")
    if options.seed is not None and not 0 <= options.seed < 2**32:
        parser.error(f"--seed must lie between 0 and 2**32 - 1; got {options.seed}")
    return options


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Prints an error in the options as one line on stderr, and exits with code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def keys(seed: int | None, number: int) -> tuple[jax.Array, jax.Array]:
    """Returns a secret key for the private run, and keys for everything else.

    With a seed, all of them are derived from it.
    """
    if seed is None:
        private_key, rest = dpoptax.random.secure_key(), jax.random.key(secrets.randbits(32))
    else:
        private_key, rest = jax.random.split(jax.random.key(seed))
    return private_key, jax.random.split(rest, number)


def key_statement(seed: int | None) -> str:
    """Returns the line that belongs next to the privacy statement."""
    if seed is None:
        return "The random key came from the operating system and was not kept."
    return f"The random key was made from seed {seed}: the guarantee holds only if nobody knows it."
