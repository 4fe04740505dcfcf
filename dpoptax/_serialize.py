"""Registry of the frozen values that can be written as JSON and read back.

A record is `{"kind": "Poisson", "num_examples": 100, ...}`: the name of the class and all its
fields. `decode` refuses a record with a missing or unknown field, and `encode` refuses a value of
an unregistered class. So a plan that is read is exactly the plan that was written.
"""

import dataclasses
import json
import math
from collections.abc import Collection
from typing import Any, TypeVar

import attrs

from dpoptax.schedules import Schedule

Value = TypeVar("Value")

_CLASSES: dict[str, type] = {}
# For values of unregistered classes: the public attributes that describe one, by interface.
_DESCRIPTIONS: list[tuple[type, tuple[str, ...]]] = []


def register(cls: type[Value]) -> type[Value]:
    """Registers a frozen attrs class or dataclass under its name; also works as a decorator."""
    _CLASSES[cls.__name__] = cls
    return cls


def register_interface(cls: type, describe_by: tuple[str, ...]) -> None:
    """Says which attributes describe a value of an unregistered class with this interface."""
    _DESCRIPTIONS.append((cls, describe_by))


def fields(cls: type) -> tuple[str, ...]:
    """Returns the names of the constructor's fields of an attrs class or a dataclass."""
    if attrs.has(cls):
        return tuple(field.name for field in attrs.fields(cls) if field.init)
    return tuple(field.name for field in dataclasses.fields(cls) if field.init)


def encode(value: Any) -> Any:
    """Returns a value in terms of JSON; infinity becomes "inf", a tuple a list."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return _encode_float(value)
    # JSON has lists only; decoding makes tuples of them, which frozen values hold.
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    cls = type(value)
    # Exactly this class: a subclass may hold more than its parent's fields.
    if _CLASSES.get(cls.__name__) is not cls:
        raise TypeError(
            f"{cls.__name__} has no record: it holds more than public numbers, or it is not a "
            f"class of dpoptax. Records exist for {', '.join(sorted(_CLASSES))}. To write a plan "
            "for UserPoisson, use Poisson(number of users, expected_batch_size) in its place."
        )
    return {"kind": cls.__name__, **{name: encode(getattr(value, name)) for name in fields(cls)}}


def decode(record: Any, expected: type[Value]) -> Value:
    """Returns the value that `encode` wrote; refuses a record of anything but an `expected`."""
    what = expected.__name__
    value = _decode(mapping(f"the record of a {what}", record), what)
    if not isinstance(value, expected):
        raise ValueError(f"expected the record of a {what}; got one of kind {record['kind']!r}.")
    return value


def decode_number(record: Any) -> Any:
    """Returns a number or a `Schedule`, whichever `encode` wrote."""
    return decode(record, Schedule) if isinstance(record, dict) else _decode(record, "number")


def encode_or_describe(value: Any) -> Any:
    """Returns `encode(value)`, or a description that is enough to tell two values apart.

    For values that no record can rebuild: `UserPoisson` holds the user of each example, and a clip
    rule of the user's own is code.
    """
    try:
        return encode(value)
    except TypeError:
        for interface, names in _DESCRIPTIONS:
            if isinstance(value, interface):
                described = {name: encode(getattr(value, name)) for name in names}
                return {"kind": type(value).__name__, **described}
        raise


def write_document(format_name: str, content: dict[str, Any]) -> str:
    """Returns a JSON document that names its format."""
    return json.dumps({"format": format_name, **content}, indent=2, allow_nan=False)


def read_document(text: str, format_name: str, names: Collection[str]) -> dict[str, Any]:
    """Returns the content of a JSON document of a format, which must have exactly these names."""
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"expected JSON; got {text[:40]!r}: {error}.") from None
    document = dict(mapping("the document", document))
    found = document.pop("format", None)
    if found != format_name:
        raise ValueError(f"expected a document of format {format_name!r}; got {found!r}.")
    _check_names("the document", document, names)
    return document


def mapping(what: str, record: Any) -> dict[str, Any]:
    """Returns `record` if it is a JSON object."""
    if not isinstance(record, dict):
        raise ValueError(f"{what} must be a JSON object; got {record!r}.")
    return record


def _encode_float(value: float) -> float | str:
    # JSON has no infinity, which is a valid clip bound.
    return "inf" if value == math.inf else value


def _decode(record: Any, what: str) -> Any:
    if isinstance(record, list):
        return tuple(_decode(item, what) for item in record)
    if not isinstance(record, dict):
        return math.inf if record == "inf" else record
    # Only registered classes are built, so that a file cannot make us call anything else.
    content = dict(record)
    kind = content.pop("kind", None)
    if kind not in _CLASSES:
        raise ValueError(
            f"unknown kind of {what}: {kind!r}; expected one of {', '.join(sorted(_CLASSES))}."
        )
    cls = _CLASSES[kind]
    _check_names(f"the record of a {kind}", content, fields(cls))
    return cls(**{name: _decode(item, f"{kind} {name}") for name, item in content.items()})


def _check_names(what: str, record: dict[str, Any], names: Collection[str]) -> None:
    if set(record) != set(names):
        missing, extra = sorted(set(names) - set(record)), sorted(set(record) - set(names))
        raise ValueError(
            f"{what} must have the fields {sorted(names)}; missing: {missing}, unknown: {extra}."
        )


register(Schedule)
