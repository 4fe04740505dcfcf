"""JSON that means one thing: each name once, and finite numbers."""

import json
from typing import Any

from dpoptax._validate import described


def parse(text: str) -> Any:
    """Returns what a JSON text says."""
    try:
        return json.loads(
            text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_int=_whole
        )
    except RecursionError:
        raise ValueError(
            "expected JSON of a document; got one with too many levels. Pass the text that to_json "
            "wrote."
        ) from None
    except json.JSONDecodeError as error:
        if text.endswith(".json"):
            raise ValueError(
                "expected JSON; got the name of a file. Pass its text: Path(name).read_text()."
            ) from None
        raise ValueError(
            f"expected JSON; got {described(text)} that cannot be read: {error.msg} at line "
            f"{error.lineno}, column {error.colno}. Pass the text that to_json wrote."
        ) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # A reader who sees the first of two values would take it for the one that counts.
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError(
            "expected each name of a JSON object once; got one twice. Pass the text that to_json "
            "wrote."
        )
    return content


def _whole(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:  # Python reads no number of thousands of digits
        raise ValueError(
            f"expected numbers in JSON; got one of {len(digits)} characters. Pass the text that "
            "to_json wrote."
        ) from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(
        f"expected finite numbers in JSON; got {name}. Pass the text that to_json wrote."
    )
