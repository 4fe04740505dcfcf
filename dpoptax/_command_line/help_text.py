"""The description of a command, with whole commands to copy below its options."""

import argparse
import json
import math
import textwrap
from typing import Any, NoReturn

from dpoptax import _serialize

# Exit statuses beside 0. A wrong command is 2, as everywhere in argparse.
CHECK_FAILED, WRONG_USAGE = 1, 2


def help_text(description: str, *examples: str) -> dict[str, Any]:
    """Returns the arguments of `add_parser` that show both."""
    return {
        "description": textwrap.fill(description, 78),
        "epilog": "\n".join(["examples:", *(f"  dpoptax {example}" for example in examples)]),
        # Lines stay as they are, so that an example can be copied.
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all errors of the command line are."""

    def error(self, message: str) -> NoReturn:
        """Prints the error, and where to read on, in place of the whole usage."""
        text = f"{self.prog}: {message.rstrip('.')}. See {self.prog} --help."
        self.exit(WRONG_USAGE, " ".join(text.split()) + "\n")


def status_of(epsilon: float) -> int:
    """Returns the exit status of a guarantee: that of a failed check if nothing is private."""
    return 0 if math.isfinite(epsilon) else CHECK_FAILED


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds the option `--json`."""
    parser.add_argument("--json", action="store_true", help="print JSON in place of text")


def print_json(**content: Any) -> None:
    """Prints numbers as JSON; infinity is the string "inf", as in reports."""
    # A dictionary is a document that another `to_json` wrote.
    shown = {
        name: item if isinstance(item, dict) else _serialize.encode(item)
        for name, item in content.items()
    }
    print(json.dumps(shown, indent=2))
