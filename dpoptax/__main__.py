"""A plan's JSON or a budget in, a privacy report or a plan out: `python -m dpoptax --help`."""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from dpoptax import _validate, accounting, samplers
from dpoptax._plan import Plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
        arguments: without the name of the program; None for those of the process.

    Returns:
        The exit status.

    Example:
        >>> main(["calibrate", "--num-examples", "1000", "--batch-size", "100", "--steps", "50",
        ...       "--epsilon", "2", "--delta", "1e-5"])
        noise_multiplier ... at epsilon = ...
        0
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (OSError, TypeError, ValueError) as error:
        print(f"dpoptax: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dpoptax", description="Privacy of training, in numbers."
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    report = commands.add_parser(
        "report",
        help="say what a plan promises",
        description="Reads a plan as Plan.to_json writes it and prints what it promises to whom.",
    )
    report.add_argument("plan", type=pathlib.Path, help="a JSON file")
    report.add_argument("--steps", type=int, help="report on the first STEPS steps only")
    report.add_argument("--json", action="store_true", help="print JSON")
    report.add_argument("--picture", type=pathlib.Path, help="draw to this file; needs matplotlib")
    report.set_defaults(run=_report)

    calibrate = commands.add_parser(
        "calibrate",
        help="find the noise, the steps or the batch size for a budget",
        description="Finds, for Poisson batches, whichever of noise multiplier, steps and batch "
        "size is not given: the least noise, the most steps, the largest batch within the budget.",
    )
    calibrate.add_argument("--num-examples", type=int, required=True, metavar="N")
    calibrate.add_argument("--epsilon", type=float, required=True, help="the budget")
    calibrate.add_argument("--delta", type=float, required=True, help="well below 1 / N")
    calibrate.add_argument("--batch-size", type=float, metavar="B", help="expected, in examples")
    calibrate.add_argument("--noise-multiplier", type=float, metavar="S", help="noise / clip bound")
    length = calibrate.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, metavar="T")
    length.add_argument("--epochs", type=float, metavar="E", help="T = ceil(E N / B) steps")
    calibrate.add_argument(
        "--l2-clip", type=float, default=1.0, help="of the plan that is written; default 1"
    )
    calibrate.add_argument("--out", type=pathlib.Path, metavar="PLAN", help="write a plan's JSON")
    calibrate.set_defaults(run=_calibrate)
    return parser


def _report(options: argparse.Namespace) -> None:
    report = Plan.from_json(options.plan.read_text()).report(options.steps)
    print(report.to_json() if options.json else report)
    if options.picture:
        report.save_picture(options.picture)


def _calibrate(options: argparse.Namespace) -> None:
    noise, size, steps = options.noise_multiplier, options.batch_size, options.steps
    lengthless = steps is None and options.epochs is None
    if [noise is None, size is None, lengthless].count(True) != 1:
        raise ValueError(
            "give all but one of --noise-multiplier, --batch-size and --steps (or --epochs): the "
            "one that is left out is found."
        )
    budget = {"epsilon": options.epsilon, "delta": options.delta}
    if size is None:
        found = accounting.calibrate_batch_size(
            num_examples=options.num_examples,
            noise_multiplier=noise,
            num_steps=steps,
            epochs=options.epochs,
            **budget,
        )
        name, size = "batch_size", found.value
    sampler = samplers.Poisson(options.num_examples, size)
    if steps is None and options.epochs is not None:
        steps = _validate.steps_of_epochs(options.epochs, options.num_examples, size)
    if noise is None:
        found = accounting.calibrate_noise_multiplier(sampler=sampler, num_steps=steps, **budget)
        name, noise = "noise_multiplier", found.value
    elif lengthless:
        found = accounting.calibrate_num_steps(sampler=sampler, noise_multiplier=noise, **budget)
        name, steps = "num_steps", int(found.value)
    print(f"{name} {found.value:.6g} at epsilon = {found.epsilon:.6g}, delta = {options.delta:g}")
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
