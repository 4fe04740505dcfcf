"""Command line: the epsilon of a run, calibration, and reports of plans. See `dpoptax --help`."""

import argparse
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from dpoptax import _validate, accounting, samplers
from dpoptax._plan import Plan
from dpoptax.accounting._epochs import num_steps_of
from dpoptax.reports import Report, round_up
from dpoptax.samplers import Sampler

EXAMPLES = """examples:
  dpoptax epsilon --num-examples 50000 --batch-size 1000 --epochs 20 --noise-multiplier 1.0
  dpoptax calibrate --num-examples 50000 --batch-size 1000 --epochs 20 --epsilon 3 --delta 1e-6
  dpoptax report plan.json --figure report.png"""


def _whole(size: float) -> float:
    # A fraction stays one, so that the sampler refuses it.
    return int(size) if float(size).is_integer() else size


# From a number of examples and a batch size to a sampler.
SAMPLERS: dict[str, Callable[[int, Any], Sampler]] = {
    "poisson": samplers.Poisson,
    "fixed-size": lambda num_examples, size: samplers.FixedSize(num_examples, _whole(size)),
    "shuffled": lambda num_examples, size: samplers.Shuffled(num_examples, _whole(size)),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
        arguments: without the name of the program; None for those of this process.

    Returns:
        The exit status: 0, or 2 after an error.

    Example:
        >>> main(["epsilon", "--num-examples", "50000", "--batch-size", "1000", "--epochs", "20",
        ...       "--noise-multiplier", "1.0", "--delta", "1e-6"])
        epsilon = ... at delta = 1e-06 ...
        0
        >>> main(["calibrate", "--num-examples", "1000", "--batch-size", "100", "--steps", "50",
        ...       "--epsilon", "2", "--delta", "1e-5"])
        noise_multiplier ... at epsilon = ...
        0
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    # What a user can mistype; anything else is a bug and keeps its traceback.
    except (OSError, TypeError, ValueError) as error:
        print(f"dpoptax: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dpoptax",
        description="Computes the privacy of training runs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    epsilon = commands.add_parser(
        "epsilon",
        help="compute the epsilon of a run",
        description="Computes the epsilon of a run from its noise, batch size and length.",
    )
    _add_run(epsilon, required=True)
    epsilon.add_argument("--delta", type=float, help="default 1 / (10 N)")
    epsilon.add_argument(
        "--relation",
        choices=["add_or_remove_one", "replace_one", "replace_special"],
        help="which data sets are neighbours; default that of the sampler",
    )
    epsilon.set_defaults(run=_epsilon)

    calibrate = commands.add_parser(
        "calibrate",
        help="find the noise, the steps or the batch size for a budget",
        description="Finds the one of noise multiplier, number of steps and batch size that is not "
        "given: the least noise, the most steps or the largest batch within the budget.",
    )
    _add_run(calibrate, required=False)
    calibrate.add_argument("--epsilon", type=float, required=True, help="the budget")
    calibrate.add_argument("--delta", type=float, required=True, help="well below 1 / N")
    calibrate.add_argument(
        "--l2-clip",
        type=float,
        default=1.0,
        help="clip bound of the plan that is written; default 1",
    )
    calibrate.add_argument("--out", type=pathlib.Path, metavar="PLAN", help="write a plan's JSON")
    calibrate.set_defaults(run=_calibrate)

    report = commands.add_parser(
        "report",
        help="print the privacy report of a plan",
        description="Reads a plan that Plan.to_json wrote and prints its privacy report.",
    )
    report.add_argument("plan", type=pathlib.Path, help="a JSON file")
    report.add_argument("--steps", type=int, help="report on the first STEPS steps only")
    report.add_argument("--json", action="store_true", help="print JSON")
    report.add_argument("--figure", type=pathlib.Path, help="draw to this file; needs matplotlib")
    report.set_defaults(run=_report)
    return parser


def _add_run(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Adds the arguments that describe a run."""
    parser.add_argument(
        "--num-examples", type=int, required=True, metavar="N", help="size of the training data"
    )
    parser.add_argument(
        "--batch-size", type=float, required=required, metavar="B", help="mean number of examples"
    )
    parser.add_argument(
        "--noise-multiplier",
        type=float,
        required=required,
        metavar="S",
        help="standard deviation of the noise on the sum, divided by the clip bound",
    )
    length = parser.add_mutually_exclusive_group(required=required)
    length.add_argument("--steps", type=int, metavar="T", help="how many steps run")
    length.add_argument(
        "--epochs", type=float, metavar="E", help="T = ceil(E N / B) steps: E passes over the data"
    )
    parser.add_argument(
        "--sampler", choices=list(SAMPLERS), default="poisson", help="how batches are drawn"
    )


def _epsilon(options: argparse.Namespace) -> None:
    delta = options.delta
    if delta is None:
        delta = 0.1 / _validate.num_examples(options.num_examples)
    sampler = SAMPLERS[options.sampler](options.num_examples, options.batch_size)
    steps = num_steps_of(sampler, options.epochs, options.steps, at_least=0)
    spent = accounting.epsilon(
        sampler=sampler,
        noise_multiplier=options.noise_multiplier,
        num_steps=steps,
        delta=delta,
        relation=options.relation,
    )
    relation = options.relation or sampler.relation
    print(
        f"epsilon = {round_up(spent)} at delta = {delta:g} ({relation}), for {steps:,} steps of "
        f"{type(sampler).__name__} batches of {options.batch_size:,g} out of "
        f"{options.num_examples:,} examples"
    )


def _report(options: argparse.Namespace) -> None:
    report = Report.from_plan(Plan.from_json(options.plan.read_text()), options.steps)
    print(report.to_json() if options.json else report)
    if options.figure:
        report.save_figure(options.figure)


def _calibrate(options: argparse.Namespace) -> None:
    noise, size, steps = options.noise_multiplier, options.batch_size, options.steps
    no_length = steps is None and options.epochs is None
    if [noise is None, size is None, no_length].count(True) != 1:
        raise ValueError(
            "give all but one of --noise-multiplier, --batch-size and --steps (or --epochs): the "
            "one that is left out is found."
        )
    budget = {"epsilon": options.epsilon, "delta": options.delta}
    # Epochs become steps only when the batch size is known, so it comes first.
    if size is None:
        size, spent = accounting.calibrate_batch_size(
            num_examples=options.num_examples,
            noise_multiplier=noise,
            num_steps=steps,
            epochs=options.epochs,
            make_sampler=SAMPLERS[options.sampler],
            **budget,
        )
        found = f"batch_size {size}"
    sampler = SAMPLERS[options.sampler](options.num_examples, size)
    if steps is None and options.epochs is not None:
        steps = num_steps_of(sampler, options.epochs, None)
    if noise is None:
        noise, spent = accounting.calibrate_noise_multiplier(
            sampler=sampler, num_steps=steps, **budget
        )
        found = f"noise_multiplier {noise:.6g}"
    elif no_length:
        steps, spent = accounting.calibrate_num_steps(
            sampler=sampler, noise_multiplier=noise, **budget
        )
        found = f"num_steps {steps}"
    print(f"{found} at epsilon = {spent:.6g}, delta = {options.delta:g}")
    if options.out:
        plan = Plan(
            sampler=sampler,
            clip=options.l2_clip,
            noise_multiplier=noise,
            num_steps=steps,
            delta=options.delta,
        )
        options.out.write_text(plan.to_json() + "\n")


if __name__ == "__main__":
    sys.exit(main())
