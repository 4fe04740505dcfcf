"""JSON of dp-accounting events, for ledgers that were charged with other releases."""

from typing import Any

import dp_accounting

from dpoptax._dp_events import (
    KnownBranchDpEvent,
    LimitedPoissonDpEvent,
    OneExampleDpEvent,
    RandomAllocationDpEvent,
    TruncatedRandomAllocationDpEvent,
)
from dpoptax._serialize import mapping
from dpoptax._validate import described

_OUR_EVENTS = (
    KnownBranchDpEvent,
    LimitedPoissonDpEvent,
    OneExampleDpEvent,
    RandomAllocationDpEvent,
    TruncatedRandomAllocationDpEvent,
)


def encode_event(event: dp_accounting.DpEvent) -> Any:
    """Returns the class name and the fields of an event, in terms of JSON."""
    return _encode(event.to_named_tuple())


def decode_event(record: Any) -> dp_accounting.DpEvent:
    """Returns the event that `encode_event` wrote; refuses anything else."""
    fields = dict(mapping("the record of an event", record))
    # Classes are looked up by name among known ones, never imported by what the text says.
    kinds = vars(dp_accounting.dp_event) | {kind.__name__: kind for kind in _OUR_EVENTS}
    kind = kinds.get(str(fields.pop("kind", None)))
    if not (isinstance(kind, type) and issubclass(kind, dp_accounting.DpEvent)):
        raise ValueError(
            "expected the record of an event of dp-accounting; got one of kind "
            f"{described(record.get('kind'))}. Pass the text that Ledger.to_json wrote."
        )
    return kind(**{name: _decode(value) for name, value in fields.items()})


def _encode(value: Any) -> Any:
    if hasattr(value, "class_name"):
        names = [name for name in value._fields if name not in ("module_name", "class_name")]
        return {"kind": value.class_name, **{name: _encode(getattr(value, name)) for name in names}}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return decode_event(value)
    return [_decode(item) for item in value] if isinstance(value, list) else value
