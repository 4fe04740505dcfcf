"""Command line: epsilon, calibration, reports and synthetic data. See `dpoptax --help`."""

import argparse
import sys
import warnings
from collections.abc import Sequence

from dpoptax._command_line.audit import add_audit
from dpoptax._command_line.calibrate import add_calibrate
from dpoptax._command_line.epsilon import add_epsilon
from dpoptax._command_line.report import add_report
from dpoptax._command_line.synthesize import add_synthesize
from dpoptax._command_line.verify import add_verify
from dpoptax._command_line_errors import show_warning, with_flags

EXAMPLES = """examples:
  dpoptax epsilon --num-examples 50000 --batch-size 1000 --epochs 20 --noise-multiplier 1.0
  dpoptax calibrate --num-examples 50000 --batch-size 1000 --epochs 20 --epsilon 3 --delta 1e-6
  dpoptax report plan.json --figure report.png
  dpoptax verify certificate.json
  dpoptax audit audit.json --figure audit.png
  dpoptax synthesize table.csv --schema schema.json --epsilon 1 --delta 1e-6 --out synthetic"""


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
        "steps or the batch size for a budget, prints privacy reports, and makes synthetic data.",
        epilog=f"{EXAMPLES}\n\nThe exit status is 0, or 2 after an error.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    add_epsilon(commands)
    add_calibrate(commands)
    add_report(commands)
    add_verify(commands)
    add_audit(commands)
    add_synthesize(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
