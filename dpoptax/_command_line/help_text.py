"""The description of a command, with whole commands to copy below its options."""

import argparse
import json
import textwrap
from typing import Any

from dpoptax import _serialize


def help_text(description: str, *examples: str) -> dict[str, Any]:
    """Returns the arguments of `add_parser` that show both."""
    return {
        "description": textwrap.fill(description, 78),
        "epilog": "\n".join(["examples:", *(f"  dpoptax {example}" for example in examples)]),
        # Lines stay as they are, so that an example can be copied.
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds the option `--json`."""
    parser.add_argument("--json", action="store_true", help="print JSON in place of text")


def print_json(**content: Any) -> None:
    """Prints numbers as JSON; infinity is the string "inf", as in reports."""
    print(json.dumps({name: _serialize.encode(item) for name, item in content.items()}, indent=2))
