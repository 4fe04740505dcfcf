"""Command `dpoptax report`: the privacy report of a plan."""

import argparse
import pathlib
from typing import Any

from dpoptax._command_line.help_text import add_json, help_text, status_of
from dpoptax._command_line_errors import faults_of_file
from dpoptax._plan import Plan
from dpoptax.reports import Report


def add_report(commands: Any) -> None:
    """Adds the command."""
    report = commands.add_parser(
        "report",
        help="print the privacy report of a plan",
        **help_text(
            "Prints the privacy report of a plan: what it guarantees, under which conditions, and "
            "what an attacker can find out.",
            "report plan.json",
            "report plan.json --steps 1000 --json",
            "report plan.json --figure report.png",
        ),
    )
    report.add_argument(
        "plan", type=pathlib.Path, help="a file from `dpoptax calibrate --out` or Plan.to_json"
    )
    report.add_argument(
        "--steps", type=int, metavar="T", help="report on the first T planned steps only"
    )
    add_json(report)
    report.add_argument(
        "--figure",
        type=pathlib.Path,
        metavar="FILE",
        help="also draw the report, to a file such as report.png; needs matplotlib",
    )
    report.set_defaults(run=_report)


def read_plan(path: pathlib.Path) -> Plan:
    """Reads a plan; the error names the file."""
    with faults_of_file(f"{path} is not a plan"):
        return Plan.from_json(path.read_text())


def _report(options: argparse.Namespace) -> int:
    plan = read_plan(options.plan)
    if options.steps is not None and options.steps > plan.num_steps:
        raise ValueError(
            f"--steps must be at most the {plan.num_steps:,} steps of the plan; got "
            f"{options.steps:,}. For a longer run, write a new plan by `dpoptax calibrate`."
        )
    report = Report.from_plan(plan, options.steps)
    print(report.to_json() if options.json else report)
    if options.figure:
        report.save_figure(options.figure)
    return status_of(report.epsilon)
