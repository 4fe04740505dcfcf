"""Command `dpoptax plan`: what a plan means, from a file, from settings, or as a suggestion."""

import argparse
import json
import pathlib
from collections.abc import Collection
from typing import Any

from dpoptax._command_line.help_text import add_json, help_text, print_json, status_of
from dpoptax._command_line.plan_in_words import plan_in_words
from dpoptax._command_line.report import read_plan
from dpoptax._command_line.run_options import SAMPLERS, add_run_options
from dpoptax._plan import Plan
from dpoptax._suggest import Suggestion, suggest

# What only one of the three ways takes.
_SETTINGS = ("batch_size", "steps", "noise_multiplier")
_BUDGET = ("num_parameters", "epsilon")
_OPTIONS = ("num_examples", "delta", "epochs", "clip", "sampler", *_SETTINGS, *_BUDGET)


def add_plan(commands: Any) -> None:
    """Adds the command."""
    plan = commands.add_parser(
        "plan",
        help="show what a plan means, or make one",
        **help_text(
            "Shows a plan in plain English: batches, clipping, noise, length and epsilon. The plan "
            "comes from a file; or from its settings; or, with --epsilon and --num-parameters, all "
            "settings are suggested. To find one setting for a budget, use calibrate.",
            "plan plan.json",
            "plan plan.json --json",
            "plan --num-examples 5000 --batch-size 500 --epochs 2 --noise-multiplier 3 --delta "
            "1e-6 --clip 0.5 --out plan.json",
            "plan --num-examples 5000 --num-parameters 2410 --epsilon 3 --delta 1e-6 --out "
            "plan.json",
        ),
    )
    plan.add_argument(
        "file",
        type=pathlib.Path,
        nargs="?",
        help="a file that `dpoptax plan`, `dpoptax calibrate` or Plan.to_json wrote",
    )
    add_run_options(plan, required=False, needs_num_examples=False)
    plan.add_argument("--delta", type=float, metavar="D", help="of the guarantee; below 1 / N")
    plan.add_argument(
        *("--clip", "--l2-clip"),
        type=float,
        metavar="C",
        help="bound on the norm of the gradient of an example; default 1, or what is suggested",
    )
    plan.add_argument("--epsilon", type=float, metavar="EPS", help="the budget of a suggestion")
    plan.add_argument(
        "--num-parameters", type=int, metavar="P", help="how many parameters a suggestion is for"
    )
    plan.add_argument(
        "--out", type=pathlib.Path, metavar="FILE", help="write the plan to this file, as JSON"
    )
    add_json(plan)
    # None, so that a sampler that has no effect is refused.
    plan.set_defaults(run=_plan, sampler=None)


def _plan(options: argparse.Namespace) -> int:
    suggestion = None
    given = {name for name in _OPTIONS if getattr(options, name) is not None}
    if options.file is not None:
        _refuse(given, set(), "a file")
        plan = read_plan(options.file)
    elif given & set(_BUDGET):
        _refuse(given, {"num_examples", "delta", *_BUDGET}, "a suggestion", {"epochs", "clip"})
        suggestion = suggest(
            num_examples=options.num_examples,
            epsilon=options.epsilon,
            delta=options.delta,
            num_parameters=options.num_parameters,
            epochs=options.epochs,
        )
        plan = suggestion.plan(clip=options.clip)
    else:
        needed = {"num_examples", "delta", "batch_size", "noise_multiplier"}
        length = {"epochs" if "epochs" in given else "steps"}
        _refuse(given, needed | length, "a plan of settings", {"clip", "sampler"})
        plan = Plan(
            sampler=SAMPLERS[options.sampler or "poisson"](
                options.num_examples, options.batch_size
            ),
            clip=1.0 if options.clip is None else options.clip,
            noise_multiplier=options.noise_multiplier,
            num_steps=options.steps,
            epochs=options.epochs,
            delta=options.delta,
        )
    if options.out:
        options.out.write_text(plan.to_json() + "\n")
    return _show(plan, suggestion, as_json=options.json)


def _refuse(given: set[str], needed: set[str], way: str, optional: Collection[str] = ()) -> None:
    """Raises unless the options are those of one way to a plan."""
    for names, what in ((needed - given, "needs"), (given - needed - set(optional), "takes no")):
        if names:
            flags = ", ".join(sorted(f"--{name.replace('_', '-')}" for name in names))
            raise ValueError(f"{way} {what} {flags}. See dpoptax plan --help for the three ways.")


def _show(plan: Plan, suggestion: Suggestion | None, *, as_json: bool) -> int:
    epsilon = plan.epsilon()
    if as_json:
        print_json(
            epsilon=epsilon,
            delta=plan.delta,
            relation=plan.sampler.relation,
            num_examples=plan.sampler.num_examples,
            batch_size=plan.sampler.expected_batch_size,
            noise_multiplier=plan.noise_multiplier,
            num_steps=plan.num_steps,
            learning_rate=None if suggestion is None else suggestion.learning_rate,
            plan=json.loads(plan.to_json()),
        )
    else:
        print(plan_in_words(plan, epsilon))
        if suggestion is not None:
            print(f"\n{suggestion}")
    return status_of(epsilon)
