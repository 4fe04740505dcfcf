"""Command line: epsilon, plans, reports, audits and synthetic data. See `dpoptax --help`."""

import argparse
import contextlib
import io
import os
import sys
import warnings
from collections.abc import Sequence

from dpoptax._command_line.audit import add_audit
from dpoptax._command_line.calibrate import add_calibrate
from dpoptax._command_line.epsilon import add_epsilon
from dpoptax._command_line.help_text import WRONG_USAGE, Parser
from dpoptax._command_line.plan import add_plan
from dpoptax._command_line.report import add_report
from dpoptax._command_line.synthesize import add_synthesize
from dpoptax._command_line.verify import add_verify
from dpoptax._command_line_errors import in_one_line, show_warning

EXAMPLES = """examples:
  dpoptax epsilon --num-examples 50000 --batch-size 1000 --epochs 20 --noise-multiplier 1.0
  dpoptax calibrate --num-examples 50000 --batch-size 1000 --epochs 20 --epsilon 3 --delta 1e-6
  dpoptax plan --num-examples 50000 --num-parameters 26010 --epsilon 3 --delta 1e-6
  dpoptax report plan.json --figure report.png
  dpoptax verify certificate.json
  dpoptax audit audit.json --figure audit.png
  dpoptax synthesize table.csv --schema schema.json --epsilon 1 --delta 1e-6 --out synthetic"""
EXIT_STATUS = """exit status:
  0  the command did what it should
  1  a check failed: the certificate is wrong, the attack exceeds the guarantee, or
     epsilon is infinite
  2  the command or its input is wrong"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
        arguments: without the name of the program; None for those of this process.

    Returns:
        The exit status: 0; 1 if a check failed, or if nothing is private; 2 after an error.

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
    out = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(out):
            warnings.showwarning = show_warning
            status = int(options.run(options))
    # What a user can mistype; anything else is a bug and keeps its traceback.
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(in_one_line(error), file=sys.stderr)
        status = WRONG_USAGE
    return _write(out.getvalue(), status)


def _write(text: str, status: int) -> int:
    """Prints what a command printed. Returns its status, which does not depend on the reader."""
    try:
        if sys.stdout is not None:  # None where a shell closed it
            sys.stdout.write(text)
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError) as error:
        print(in_one_line(error), file=sys.stderr)
        return WRONG_USAGE
    return status


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="dpoptax",
        description="Plans private training runs, computes what they cost (epsilon), prints\n"
        "privacy reports, checks certificates and audits, and makes synthetic data. Each\n"
        "command has --help with examples, and --json for programs.",
        epilog=f"{EXAMPLES}\n\n{EXIT_STATUS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    add_epsilon(commands)
    add_calibrate(commands)
    add_plan(commands)
    add_report(commands)
    add_verify(commands)
    add_audit(commands)
    add_synthesize(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
