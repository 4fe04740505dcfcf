"""Command `dpoptax verify`: the epsilon of a certificate, computed again."""

import argparse
import pathlib
import sys
from typing import Any

from dpoptax._command_line.help_text import CHECK_FAILED, add_json, help_text, print_json
from dpoptax._command_line_errors import InputFileError
from dpoptax.audit._verify import CheckFailedError, verify


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
            "verify certificate.json --json",
        ),
    )
    verifier.add_argument("file", type=pathlib.Path, help="the certificate")
    add_json(verifier)
    verifier.set_defaults(run=_verify)


def _verify(options: argparse.Namespace) -> int:
    try:
        text = options.file.read_text()
    except UnicodeDecodeError:
        raise InputFileError(f"{options.file} is not a certificate: it is no text") from None
    try:
        found = verify(text)
    except CheckFailedError as error:
        if options.json:
            print_json(verified=False, reason=str(error))
        print(f"dpoptax: {options.file}: {' '.join(str(error).split())}", file=sys.stderr)
        return CHECK_FAILED
    except ValueError as error:
        raise InputFileError(f"{options.file}: {error}") from None
    if options.json:
        print_json(verified=True, **found._asdict())
    else:
        print(found.in_words())
    return 0
