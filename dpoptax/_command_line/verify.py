"""Command `dpoptax verify`: the epsilon of a certificate, computed again."""

import argparse
import pathlib
from typing import Any

from dpoptax._command_line.help_text import help_text
from dpoptax.audit._verify import verify


def add_verify(commands: Any) -> None:
    """Adds the command."""
    verifier = commands.add_parser(
        "verify",
        help="compute the epsilon of a certificate again",
        **help_text(
            "Reads a certificate that Certificate.to_json wrote, and computes its epsilon again: "
            "by dp-accounting alone where it knows the event, else by dpoptax. It does not look at "
            "the program. The exit status is 0 only if the epsilon is right.",
            "verify certificate.json",
        ),
    )
    verifier.add_argument("file", type=pathlib.Path, help="the certificate")
    verifier.set_defaults(run=_verify)


def _verify(options: argparse.Namespace) -> None:
    try:
        text = options.file.read_text()
    except UnicodeDecodeError:
        raise ValueError(f"{options.file} is not a certificate: it is no text") from None
    try:
        print(verify(text))
    except ValueError as error:
        raise ValueError(f"{options.file}: {error}") from None
