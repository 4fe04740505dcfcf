"""Command `dpoptax calibrate`: the noise, the steps or the batch size for a budget."""

import argparse
import pathlib
from typing import Any

from dpoptax import accounting
from dpoptax._command_line.budget_options import add_budget_options, risk_of
from dpoptax._command_line.help_text import add_json, help_text, print_json
from dpoptax._command_line.run_options import SAMPLERS, add_run_options
from dpoptax._plan import Plan
from dpoptax.accounting._epochs import num_steps_of
from dpoptax.accounting._smallest_batch import calibrate_with_smallest_batch, with_smallest_batch
from dpoptax.reports._round import round_up_significant
from dpoptax.samplers import Sampler


def add_calibrate(commands: Any) -> None:
    """Adds the command."""
    calibrate = commands.add_parser(
        "calibrate",
        help="find the noise, the steps or the batch size for a budget",
        **help_text(
            "Give two of these three: the noise multiplier, the batch size, and the length (steps "
            "or epochs). The third is found: the least noise, the largest batch or the most steps "
            "within the budget.",
            "calibrate --num-examples 5000 --batch-size 500 --epochs 20 --epsilon 3 --delta 1e-6",
            "calibrate --num-examples 5000 --batch-size 500 --noise-multiplier 3 --epsilon 3 "
            "--delta 1e-6",
            "calibrate --num-examples 5000 --batch-size 500 --epochs 20 --advantage 0.1 "
            "--delta 1e-6 --out plan.json",
        ),
    )
    add_run_options(calibrate, required=False)
    add_budget_options(calibrate)
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
    add_json(calibrate)
    calibrate.set_defaults(run=_calibrate)


def _calibrate(options: argparse.Namespace) -> int:
    noise, size, steps = options.noise_multiplier, options.batch_size, options.steps
    no_length = steps is None and options.epochs is None
    if [noise is None, size is None, no_length].count(True) != 1:
        raise ValueError(
            "give all but one of --noise-multiplier, --batch-size and --steps (or --epochs): the "
            "one that is left out is found."
        )
    risk, in_words = risk_of(options)
    delta = options.delta
    budget: dict[str, Any] = {"epsilon": options.epsilon, "risk": risk, "delta": delta}

    def make_sampler(num_examples: int, batch_size: float) -> Sampler:
        sampler = SAMPLERS[options.sampler](num_examples, batch_size)
        # A plan takes the smallest padded batch, which costs a little: it must be paid for here.
        return sampler if noise is None else with_smallest_batch(sampler, noise, delta)

    # Epochs become steps only when the batch size is known, so it comes first.
    if size is None:
        size, spent = accounting.calibrate_batch_size(
            num_examples=options.num_examples,
            noise_multiplier=noise,
            num_steps=steps,
            epochs=options.epochs,
            make_sampler=make_sampler,
            **budget,
        )
        found = f"batch_size {size}"
    sampler = make_sampler(options.num_examples, size)
    if steps is None and options.epochs is not None:
        steps = num_steps_of(sampler, options.epochs, None)
    if noise is None:
        sampler, (noise, spent) = calibrate_with_smallest_batch(
            sampler, steps, options.epsilon, delta, risk=risk
        )
        found = f"noise_multiplier {round_up_significant(noise, 6)}"
    elif no_length:
        steps, spent = accounting.calibrate_num_steps(
            sampler=sampler, noise_multiplier=noise, **budget
        )
        found = f"num_steps {steps}"
    limit = f", for at most: {in_words}" if risk else ""
    if options.json:
        print_json(
            epsilon=spent, delta=delta, noise_multiplier=noise, batch_size=size, num_steps=steps
        )
    else:
        print(f"{found} at epsilon = {round_up_significant(spent, 6)}, delta = {delta:g}{limit}")
    if options.out:
        plan = Plan(
            sampler=sampler,
            clip=options.clip,
            noise_multiplier=noise,
            num_steps=steps,
            delta=delta,
        )
        options.out.write_text(plan.to_json() + "\n")
    return 0
