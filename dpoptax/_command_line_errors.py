"""Errors and warnings of the library in the names of the command line."""

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import Any

# What arguments of the library are called here.
FLAGS = {
    "expected_batch_size": "--batch-size",
    "batch_size": "--batch-size",
    "num_examples": "--num-examples",
    "num_steps": "--steps",
    "noise_multiplier": "--noise-multiplier",
}
# Of a limit on an attack: its flag, its other field, and the flag of that.
RISKS = {
    "Advantage": ("--advantage", "none", "none"),
    "TruePositiveRate": ("--tpr", "false_positive_rate", "--fpr"),
    "PosteriorBelief": ("--posterior", "prior", "--prior"),
    "Reconstruction": ("--reconstruction", "baseline", "--baseline"),
}


class InputFileError(ValueError):
    """A fault in a file. Its message has the names of the file, which are not those of options."""


@contextlib.contextmanager
def faults_of_file(start: str) -> Iterator[None]:
    """Makes errors of what is read here name the file, as in `start`. Some files are no text."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise InputFileError(f"{start}: {error}") from None


def in_one_line(error: Exception) -> str:
    """Returns what the command line prints of an error, for logs and for scripts that read them."""
    message = str(error)
    if isinstance(error, OSError) and error.filename:
        message = f"{error.filename}: {error.strerror}"
    elif not isinstance(error, InputFileError):
        message = with_flags(message)
    return f"dpoptax: {' '.join(message.split())}"


def show_warning(message: Any, *details: Any, **more: Any) -> None:
    """Prints a warning without the line of our program that it came from."""
    del details, more
    print(f"dpoptax: warning: {with_flags(str(message))}", file=sys.stderr)


def with_flags(message: str) -> str:
    """Returns an error of the library with the names of the command line."""
    # In a formula, N as in the help.
    message = re.sub(r"([*/] )num_examples\b", r"\1N", message)
    message = re.sub(r"\brelation='(\w+)'", r"--relation \1", message)
    message = re.sub(r"^(clip|delta|epsilon|epochs)(?= (bounds|must|should))", r"--\1", message)
    for kind, (limit, field, given) in RISKS.items():
        message = re.sub(rf"{kind}\(limit=([^,)]+)\)", rf"{limit} \1", message)
        message = re.sub(rf"{kind}\(limit=(.+), {field}=(.+)\)", rf"{limit} \1 {given} \2", message)
        if f" of {kind}" in message:
            message = message.replace(f"the limit of {kind}", limit)
            message = re.sub(rf"\b{field}\b( of {kind})?", given, message)
    for name, flag in FLAGS.items():
        message = re.sub(rf"\b{name}\b", flag, message)
    return message
