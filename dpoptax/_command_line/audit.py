"""Command `dpoptax audit`: what an attack on a run reached, beside the guarantee."""

import argparse
import json
import pathlib
from typing import Any

from dpoptax._attacks import Audit
from dpoptax._command_line.help_text import CHECK_FAILED, add_json, help_text
from dpoptax._command_line_errors import faults_of_file


def add_audit(commands: Any) -> None:
    """Adds the command."""
    audit = commands.add_parser(
        "audit",
        help="print what an attack on a run reached",
        **help_text(
            "Prints a lower bound on epsilon from the scores of an attack, beside the epsilon of "
            "the guarantee. The scores are not private, and neither is what is printed. The exit "
            "status is 1 if the bound exceeds that guarantee.",
            "audit audit.json",
            "audit audit.json --confidence 0.99 --figure audit.png",
        ),
    )
    audit.add_argument("file", type=pathlib.Path, help="a file that Audit.to_json wrote")
    audit.add_argument(
        "--confidence",
        type=float,
        default=0.95,
        metavar="P",
        help="probability that a correct run has a bound that is not too large; default 0.95",
    )
    add_json(audit)
    audit.add_argument(
        "--figure",
        type=pathlib.Path,
        metavar="FILE",
        help="also draw the attack beside the guarantee, to a file such as audit.png; needs "
        "matplotlib",
    )
    audit.set_defaults(run=_audit)


def _audit(options: argparse.Namespace) -> int:
    with faults_of_file(f"{options.file} is not an audit"):
        audit = Audit.from_json(options.file.read_text())
    # Refuses if there are too few canaries.
    bound = audit.lower_bound(options.confidence)
    if options.json:
        print(json.dumps(audit.summary(options.confidence).record(), indent=2))
    else:
        print(audit.as_text(options.confidence))
    if options.figure:
        audit.save_figure(options.figure)
    return CHECK_FAILED if bound.epsilon > audit.epsilon else 0
