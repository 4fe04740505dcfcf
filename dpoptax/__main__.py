"""Command line: the epsilon of a run, calibration, and reports of plans. See `dpoptax --help`."""

import argparse
import pathlib
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from dpoptax import _validate, accounting, samplers
from dpoptax._command_line_errors import show_warning, with_flags
from dpoptax._plan import Plan
from dpoptax.accounting._epochs import num_steps_of
from dpoptax.audit._verify import verify
from dpoptax.reports import Report, round_up
from dpoptax.reports._round import round_up_significant
from dpoptax.samplers import Sampler

EXAMPLES = """examples:
  dpoptax epsilon --num-examples 50000 --batch-size 1000 --epochs 20 --noise-multiplier 1.0
  dpoptax calibrate --num-examples 50000 --batch-size 1000 --epochs 20 --epsilon 3 --delta 1e-6
  dpoptax report plan.json --figure report.png
  dpoptax verify certificate.json"""


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
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            options.run(options)
    # What a user can mistype; anything else is a bug and keeps its traceback.
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"dpoptax: {reason}", file=sys.stderr)
        return 2
    except (TypeError, ValueError) as error:
        print(f"dpoptax: {with_flags(str(error))}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dpoptax",
        description="Computes what a private training run costs (epsilon), finds the noise, the "
        "steps or the batch size for a budget, and prints privacy reports.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    _add_epsilon(commands)
    _add_calibrate(commands)
    _add_report(commands)
    _add_verify(commands)
    return parser


def _add_epsilon(commands: Any) -> None:
    epsilon = commands.add_parser(
        "epsilon",
        help="compute the epsilon of a run",
        description="Computes the epsilon of a run from its noise, batch size and length.",
    )
    _add_run(epsilon, required=True)
    epsilon.add_argument(
        "--delta", type=float, metavar="D", help="of the guarantee; default 1 / (10 N)"
    )
    epsilon.add_argument(
        "--relation",
        choices=["add_or_remove_one", "replace_one", "replace_special"],
        help="which data sets are neighbours; default that of the sampler",
    )
    epsilon.set_defaults(run=_epsilon)


def _add_calibrate(commands: Any) -> None:
    calibrate = commands.add_parser(
        "calibrate",
        help="find the noise, the steps or the batch size for a budget",
        description="Give two of these three: the noise multiplier, the batch size, and the length "
        "(steps or epochs). The third is found: the least noise, the largest batch or the most "
        "steps within the budget.",
    )
    _add_run(calibrate, required=False)
    calibrate.add_argument("--epsilon", type=float, required=True, metavar="EPS", help="the budget")
    calibrate.add_argument(
        "--delta", type=float, required=True, metavar="D", help="of the budget; well below 1 / N"
    )
    calibrate.add_argument(
        *("--clip", "--l2-clip"),
        type=float,
        default=1.0,
        metavar="C",
        help="clip bound of the plan that is written; it does not change epsilon; default 1",
    )
    calibrate.add_argument(
        "--out",
        type=pathlib.Path,
        metavar="FILE",
        help="write the plan to this file, as JSON that `dpoptax report` and Plan.from_json read",
    )
    calibrate.set_defaults(run=_calibrate)


def _add_report(commands: Any) -> None:
    report = commands.add_parser(
        "report",
        help="print the privacy report of a plan",
        description="Prints the privacy report of a plan: what it guarantees, under which "
        "conditions, and what an attacker can find out.",
    )
    report.add_argument(
        "plan", type=pathlib.Path, help="a file from `dpoptax calibrate --out` or Plan.to_json"
    )
    report.add_argument(
        "--steps", type=int, metavar="T", help="report on the first T planned steps only"
    )
    report.add_argument("--json", action="store_true", help="print JSON in place of text")
    report.add_argument(
        "--figure",
        type=pathlib.Path,
        metavar="FILE",
        help="also draw the report, to a file such as report.png; needs matplotlib",
    )
    report.set_defaults(run=_report)


def _add_run(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Adds the arguments that describe a run."""
    parser.add_argument(
        "--num-examples",
        type=int,
        required=True,
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


def _add_verify(commands: Any) -> None:
    verifier = commands.add_parser(
        "verify",
        help="compute the epsilon of a certificate again",
        description="Reads a certificate that Certificate.to_json wrote, and computes its epsilon "
        "again: by dp-accounting alone where that knows the event, else by dpoptax. It does not "
        "look at the program.",
    )
    verifier.add_argument("file", type=pathlib.Path, help="the certificate")
    verifier.set_defaults(run=_verify)


def _verify(options: argparse.Namespace) -> None:
    try:
        text = options.file.read_text()
    except UnicodeDecodeError:
        raise ValueError(f"{options.file} is not a certificate: it is no text") from None
    print(verify(text))


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
    try:
        plan = Plan.from_json(options.plan.read_text())
    except ValueError as error:  # also a file that is no text
        raise ValueError(f"{options.plan} is not a plan: {error}") from None
    report = Report.from_plan(plan, options.steps)
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
        found = f"noise_multiplier {round_up_significant(noise, 6)}"
    elif no_length:
        steps, spent = accounting.calibrate_num_steps(
            sampler=sampler, noise_multiplier=noise, **budget
        )
        found = f"num_steps {steps}"
    print(f"{found} at epsilon = {round_up_significant(spent, 6)}, delta = {options.delta:g}")
    if options.out:
        plan = Plan(
            sampler=sampler,
            clip=options.clip,
            noise_multiplier=noise,
            num_steps=steps,
            delta=options.delta,
        )
        options.out.write_text(plan.to_json() + "\n")


if __name__ == "__main__":
    sys.exit(main())
