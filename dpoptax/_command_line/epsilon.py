"""Command `dpoptax epsilon`: the epsilon of a run."""

import argparse
from typing import Any

from dpoptax import _validate, accounting
from dpoptax._command_line.help_text import add_json, help_text, print_json, status_of
from dpoptax._command_line.run_options import SAMPLERS, add_run_options
from dpoptax.accounting._epochs import num_steps_of
from dpoptax.reports import round_up


def add_epsilon(commands: Any) -> None:
    """Adds the command."""
    epsilon = commands.add_parser(
        "epsilon",
        help="compute the epsilon of a run",
        **help_text(
            "Computes the epsilon of a run from its noise, batch size and length.",
            "epsilon --num-examples 50000 --batch-size 1000 --epochs 20 --noise-multiplier 1",
            "epsilon --num-examples 50000 --batch-size 1000 --steps 9 --noise-multiplier 1 --json",
        ),
    )
    add_run_options(epsilon, required=True)
    epsilon.add_argument(
        "--delta", type=float, metavar="D", help="of the guarantee; default 1 / (10 N)"
    )
    epsilon.add_argument(
        "--relation",
        choices=["add_or_remove_one", "replace_one", "replace_special"],
        help="which data sets are neighbours; default that of the sampler",
    )
    add_json(epsilon)
    epsilon.set_defaults(run=_epsilon)


def _epsilon(options: argparse.Namespace) -> int:
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
    if options.json:
        noise = options.noise_multiplier
        print_json(
            epsilon=spent, delta=delta, relation=relation, num_steps=steps, noise_multiplier=noise
        )
        return status_of(spent)
    print(
        f"epsilon = {round_up(spent)} at delta = {delta:g} ({relation}), for {steps:,} steps of "
        f"{type(sampler).__name__} batches of {options.batch_size:,g} out of "
        f"{options.num_examples:,} examples"
    )
    return status_of(spent)
