"""Registry of the frozen values that can be written as JSON and read back.

A record is `{"kind": "Poisson", "num_examples": 100, ...}`: the name of the class and all its
fields. A class of the user's own has the kind "module:Class". `decode` refuses a record with a
missing or unknown field, and `encode` refuses a value that a record cannot rebuild. So a plan that
is read is exactly the plan that was written.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple, TypeVar, cast

import attrs
import numpy as np

from dpoptax._json_text import parse
from dpoptax._validate import described
from dpoptax.schedules import Schedule

Value = TypeVar("Value")


_CLASS_NAME = re.compile(r"[\w.]{1,100}:[\w.<>]{1,100}", re.ASCII)
# How many names of a file an error lists.
_MAX_NAMES = 5


class _Record(NamedTuple):
    """How a registered class is written: the names of its fields, and what makes a value."""

    cls: type
    names: tuple[str, ...]
    make: Callable[..., Any]


_CLASSES: dict[str, _Record] = {}
# What a class of the user's own can be, and the public attributes that describe a value of it.
_INTERFACES: list[tuple[type, tuple[str, ...]]] = []


def register(
    cls: type[Value],
    names: tuple[str, ...] | None = None,
    make: Callable[..., Value] | None = None,
) -> type[Value]:
    """Registers a frozen attrs class or dataclass under its name; also works as a decorator.

    By default a record has all fields of the constructor. A class whose fields hold more than
    public numbers gives the `names` of the attributes that are written, and `make` for reading.
    """
    _CLASSES[cls.__name__] = _Record(cls, fields(cls) if names is None else names, make or cls)
    return cls


def register_interface(cls: type, describe_by: tuple[str, ...]) -> None:
    """Registers an interface for the user's own classes, and the attributes that describe one."""
    _INTERFACES.append((cls, describe_by))


def fields(cls: type) -> tuple[str, ...]:
    """Returns the names of the constructor's fields of an attrs class or a dataclass."""
    return tuple(_aliases(cls))


def _aliases(cls: type) -> dict[str, str]:
    """Returns the name of the constructor's argument for each field."""
    if attrs.has(cls):
        return {field.name: field.alias for field in attrs.fields(cls) if field.init}
    return {field.name: field.name for field in dataclasses.fields(cls) if field.init}


def encode(value: Any) -> Any:
    """Returns a value in terms of JSON; infinity becomes "inf", a tuple a list.

    Raises:
        TypeError: a record cannot rebuild the value.
    """
    return _encode(value, type(value).__name__, {})


def _encode(value: Any, where: str, own: dict[str, _Record]) -> Any:
    """Returns a value in terms of JSON, and adds the user's classes that it has to `own`."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return _encode_float(value)
    # JSON has lists only; decoding makes tuples of them, which frozen values hold.
    if isinstance(value, tuple | list):
        return [_encode(item, where, own) for item in value]
    if isinstance(value, dict):
        return {"kind": "dict", "items": [_encode(item, where, own) for item in value.items()]}
    cls = type(value)
    known = _CLASSES.get(cls.__name__)
    # Exactly this class: a subclass may hold more than its parent's fields.
    if known is None or known.cls is not cls:
        if not any(isinstance(value, interface) for interface, _ in _INTERFACES):
            raise TypeError(
                f"a record holds numbers, strings, and tuples and dicts of them; got {where} of "
                f"type {cls.__name__}. Make it one of these. Data do not belong into a record."
            )
        known = own[kind_of(cls)] = _own_record(cls)
    content = {"kind": kind_of(cls) if kind_of(cls) in own else cls.__name__}
    for name in known.names:
        content[name] = _encode(getattr(value, name), f"{cls.__name__}.{name}", own)
    # Fields alone may not be all: a constructor of the user's own can do anything with them.
    has_equality = any("__eq__" in vars(base) for base in cls.__mro__[:-1])
    compared = kind_of(cls) in own and has_equality
    if compared and _decode(content, cls.__name__, own) != value:
        raise TypeError(
            f"{cls.__name__} has no record: made again from its fields, it differs. Keep its "
            "settings in fields that are numbers, strings, tuples or dicts."
        )
    return content


def kind_of(cls: type) -> str:
    """Returns the name of a class of the user's own in a record."""
    return f"{cls.__module__}:{cls.__qualname__}"


def _own_record(cls: type) -> _Record:
    _check_frozen(cls)
    aliases = _aliases(cls)

    def make(**content: Any) -> Any:
        return cls(**{aliases[name]: item for name, item in content.items()})

    return _Record(cls, tuple(aliases), make)


def _check_frozen(cls: Any) -> None:
    if not (isinstance(cls, type) and (attrs.has(cls) or dataclasses.is_dataclass(cls))):
        name = cls.__name__ if isinstance(cls, type) else type(cls).__name__
        raise TypeError(
            f"{name} has no record: a class needs fields to be written and read back. Make it an "
            "@attrs.frozen class, or a dataclass with frozen=True."
        )


def decode(
    record: Any, expected: type[Value] | tuple[type, ...], classes: Iterable[type] = ()
) -> Value:
    """Returns the value that `encode` wrote; refuses a record of anything but an `expected`.

    Args:
        record: in terms of JSON.
        expected: the class or interface of the value, or several. Errors name the first.
        classes: the user's own classes that the record may have. No class is ever imported, or
            looked up, because a record names it.
    """
    what = (expected if isinstance(expected, type) else expected[0]).__name__
    own = {kind_of(cls): _own_record(cls) for cls in classes}
    value = _decode(mapping(f"the record of a {what}", record), what, own)
    if not isinstance(value, expected):
        kind = described(record.get("kind"))
        raise ValueError(f"expected the record of a {what}; got one of kind {kind}.")
    return cast(Value, value)


def decode_number(record: Any) -> Any:
    """Returns a number or a `Schedule`, whichever `encode` wrote."""
    return decode(record, Schedule) if isinstance(record, dict) else _decode(record, "number", {})


def encode_or_describe(value: Any) -> Any:
    """Returns `encode(value)`, or a description that is enough to tell two values apart.

    For values that no record can rebuild: a class of the user's own may hold data or code.
    """
    try:
        return encode(value)
    except TypeError:
        for interface, names in _INTERFACES:
            if isinstance(value, interface):
                return _describe(value, names)
        raise


def _describe(value: Any, names: Iterable[str]) -> dict[str, Any]:
    """Returns the class of a value, some of its attributes, and its public plain fields."""
    cls = type(value)
    own = vars(value) if hasattr(value, "__dict__") else fields(cls) if attrs.has(cls) else ()
    described: dict[str, Any] = {"kind": kind_of(cls)}
    for name in (*names, *(name for name in own if not name.startswith("_"))):
        try:
            described[name] = encode(getattr(value, name))
        except TypeError:
            if name in names:
                raise
    return described


def summary(record: Any) -> str:
    """Returns the kind and the numbers of a record of `encode_or_describe`, in a bounded text."""
    if not isinstance(record, dict):
        return described(record)
    numbers = [
        f"{described(name)[1:-1]} {item}"
        for name, item in record.items()
        if isinstance(item, int | float)
    ]
    listed = f" ({', '.join(numbers[:_MAX_NAMES])})" if numbers else ""
    return f"{described(str(record.get('kind')).rpartition(':')[2])[1:-1]}{listed}"


def write_document(format_name: str, content: dict[str, Any]) -> str:
    """Returns a JSON document that names its format."""
    return json.dumps({"format": format_name, **content}, indent=2, allow_nan=False)


def read_document(text: str, format_name: str, names: Collection[str]) -> dict[str, Any]:
    """Returns the content of a JSON document of a format, which must have exactly these names."""
    document = parse(text)
    document = dict(mapping("the document", document))
    found = document.pop("format", None)
    if found != format_name:
        raise ValueError(
            f"expected a document of format {format_name!r}; got {described(found)}. Pass text of "
            "that format, as to_json writes it."
        )
    _check_names("the document", document, names)
    return document


def mapping(what: str, record: Any) -> dict[str, Any]:
    """Returns `record` if it is a JSON object."""
    if not isinstance(record, dict):
        raise ValueError(
            f"{what} must be a JSON object; got {described(record)}. Pass what to_json wrote."
        )
    return record


def _encode_float(value: float) -> float | str:
    # JSON has no infinity, which is a valid clip bound.
    return {math.inf: "inf", -math.inf: "-inf"}.get(value, value)


def _decode(record: Any, what: str, own: dict[str, _Record]) -> Any:
    if isinstance(record, list):
        return tuple(_decode(item, what, own) for item in record)
    if not isinstance(record, dict):
        return float(record) if record in ("inf", "-inf") else record
    # Only known classes are built, so that a file cannot make us call anything else.
    content = dict(record)
    kind = content.pop("kind", None)
    if kind == "dict":
        _check_names("the record of a dict", content, ["items"])
        return dict(_decode(content["items"], what, own))
    known = _CLASSES | own
    if kind not in known:
        # Text of a file is shown only if it is the name of a class.
        is_class = isinstance(kind, str) and _CLASS_NAME.fullmatch(kind) is not None
        module, _, name = kind.rpartition(":") if is_class else ("", "", "")
        remedy = f" To read a class of {module}, pass it: classes=[{name}]." if is_class else ""
        raise ValueError(
            f"unknown kind of {what}: {repr(kind) if is_class else described(kind)}; expected one "
            f"of {', '.join(sorted(known))}.{remedy}"
        )
    cls, names, make = known[kind]
    _check_names(f"the record of a {cls.__name__}", content, names)
    return make(**{name: _decode(item, f"{kind} {name}", own) for name, item in content.items()})


def _check_names(what: str, record: dict[str, Any], names: Collection[str]) -> None:
    if set(record) != set(names):
        missing, extra = sorted(set(names) - set(record)), sorted(set(record) - set(names))
        shown = ", ".join(map(described, extra[:_MAX_NAMES]))
        if len(extra) > _MAX_NAMES:
            shown += f" and {len(extra) - _MAX_NAMES} more"
        raise ValueError(
            f"{what} must have the fields {sorted(names)}; missing: {missing}, unknown: [{shown}]. "
            "Write it again with this version of dpoptax."
        )


register(Schedule)
