"""Samplers, clip rules, schedules and plans in, JSON out; and back.

A record names its kind and every number that makes it. What a record does not hold is refused, in
both directions: a plan that is read is the plan that was written.
"""

import dataclasses
import json
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import attrs
import dp_accounting

from dpoptax import samplers
from dpoptax._dp_events import KnownBranchDpEvent
from dpoptax.clipping import ClipRule, FlatClip
from dpoptax.mechanisms import DiscreteGaussian, Gaussian, Mechanism
from dpoptax.samplers import Sampler
from dpoptax.schedules import Schedule, Scheduled

if TYPE_CHECKING:
    from dpoptax._plan import Plan

FORMAT = "dpoptax plan 1"
SAMPLERS = {
    kind.__name__: kind
    for kind in (
        samplers.Poisson,
        samplers.FixedSize,
        samplers.Shuffled,
        samplers.BallsInBins,
        samplers.CyclicPoisson,
    )
}
MECHANISMS: dict[str, type[Gaussian | DiscreteGaussian]] = {
    "floating_point": Gaussian,
    "exact": DiscreteGaussian,
}


def plan_to_json(plan: "Plan") -> str:
    """Writes a plan.

    Args:
        plan: of samplers and clip rules of this library.

    Returns:
        JSON.

    Raises:
        TypeError: a sampler or clip rule that has no record.
    """
    record = {
        "format": FORMAT,
        "sampler": sampler_record(plan.sampler),
        "clip": clip_record(plan.clip_rule),
        "noise_multiplier": number_record(plan.noise_multiplier),
        "num_steps": plan.num_steps,
        "delta": plan.delta,
        "mechanism": mechanism_record(plan.mechanism),
    }
    return json.dumps(record, indent=2, allow_nan=False)


def plan_fields(text: str) -> dict[str, Any]:
    """Reads a plan.

    Args:
        text: what `plan_to_json` wrote.

    Returns:
        The arguments of `Plan`.

    Raises:
        ValueError: anything else.
    """
    names = {"sampler", "clip", "noise_multiplier", "num_steps", "delta", "mechanism"}
    record = parse(text, FORMAT, names)
    return {
        **record,
        "sampler": sampler_of(record["sampler"]),
        "clip": clip_of(record["clip"]),
        "noise_multiplier": _number_of(record["noise_multiplier"]),
        "mechanism": mechanism_of(record["mechanism"]),
    }


def parse(text: str, expected: str, names: set[str]) -> dict[str, Any]:
    """Reads a JSON object of a known format.

    Args:
        text: JSON.
        expected: the format that it must name.
        names: what else it must hold, and nothing beyond.

    Returns:
        The object, without its format.

    Raises:
        ValueError: anything else.
    """
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"expected JSON; got {text[:40]!r}: {error}.") from None
    record = dict(_mapping("a record", record))
    found = record.pop("format", None)
    if found != expected:
        raise ValueError(f"expected a record of format {expected!r}; got {found!r}.")
    _only("the record", record, names)
    return record


def sampler_record(sampler: Sampler) -> dict[str, Any]:
    """Returns the kind and the numbers of a sampler.

    Args:
        sampler: one of `dpoptax.samplers` but `UserPoisson`.

    Returns:
        What JSON can hold.

    Raises:
        TypeError: another.
    """
    if isinstance(sampler, samplers.PoissonSchedule):
        stages = [[sampler_record(stage), length] for stage, length in sampler.stages]
        return {"kind": "PoissonSchedule", "stages": stages}
    if SAMPLERS.get(type(sampler).__name__) is not type(sampler):
        raise TypeError(
            f"{type(sampler).__name__} has no record: it holds more than public numbers, or is not "
            f"of dpoptax. Records exist for {', '.join([*SAMPLERS, 'PoissonSchedule'])}; a plan for users "
            "can be written with Poisson(number of users, expected_batch_size)."
        )
    return {"kind": type(sampler).__name__, **attrs.asdict(sampler)}


def sampler_of(record: Any) -> Sampler:
    """Returns the sampler of a record.

    Args:
        record: what `sampler_record` returned.

    Returns:
        A sampler.

    Raises:
        ValueError: a record of no known kind, or with other numbers than it needs.
    """
    kind, fields = _kind_and_fields("sampler", record, [*SAMPLERS, "PoissonSchedule"])
    if kind == "PoissonSchedule":
        _only("PoissonSchedule", fields, {"stages"})
        return samplers.PoissonSchedule(tuple((sampler_of(s), n) for s, n in fields["stages"]))
    _only(kind, fields, {field.name for field in attrs.fields(SAMPLERS[kind])})
    return SAMPLERS[kind](**fields)


def mechanism_record(mechanism: Mechanism) -> dict[str, Any]:
    """Returns the kind and the numbers of a mechanism.

    Args:
        mechanism: one of `dpoptax.mechanisms`.

    Returns:
        What JSON can hold.

    Raises:
        TypeError: another.
    """
    if isinstance(mechanism, Gaussian):
        return {"kind": "floating_point", **attrs.asdict(mechanism)}
    if isinstance(mechanism, DiscreteGaussian):
        return {"kind": "exact", **attrs.asdict(mechanism)}
    raise TypeError(f"{type(mechanism).__name__} has no record; it is not of dpoptax.")


def mechanism_of(record: Any) -> Mechanism:
    """Returns the mechanism of a record.

    Args:
        record: what `mechanism_record` returned.

    Returns:
        A mechanism.

    Raises:
        ValueError: a record of no known kind, or with other numbers than it needs.
    """
    kind, fields = _kind_and_fields("mechanism", record, MECHANISMS)
    _only(kind, fields, {field.name for field in attrs.fields(MECHANISMS[kind])})
    return MECHANISMS[kind](**fields)


def sampler_identity(sampler: Sampler) -> dict[str, Any]:
    """Returns what tells a sampler from another, also where it has no record.

    Args:
        sampler: any.

    Returns:
        What JSON can hold.
    """
    try:
        return sampler_record(sampler)
    except TypeError:
        return {
            "kind": type(sampler).__name__,
            "unit": sampler.unit,
            "num_examples": sampler.num_examples,
            "expected_batch_size": number_record(sampler.expected_batch_size),
            "max_batch_size": sampler.max_batch_size,
        }


def clip_identity(clip: ClipRule) -> dict[str, Any]:
    """Returns what tells a clip rule from another, also where it has no record.

    Args:
        clip: any.

    Returns:
        What JSON can hold.
    """
    if isinstance(clip, FlatClip):
        return clip_record(clip)
    return {"kind": type(clip).__name__, "l2_clip": number_record(clip.l2_clip)}


def number_record(value: Any) -> Any:
    """Returns a number, or the values and lengths of a schedule; infinity as "inf".

    Args:
        value: a number or a `Schedule`.

    Returns:
        What JSON can hold.
    """
    if isinstance(value, Schedule):
        return {"values": list(value.values), "lengths": list(value.lengths)}
    return "inf" if math.isinf(value) else value


def event_record(event: dp_accounting.DpEvent) -> Any:
    """Returns the kind and the numbers of a dp-accounting event.

    Args:
        event: any that converts to a named tuple.

    Returns:
        What JSON can hold.

    Raises:
        ValueError: an event that does not convert.
    """
    return _event_record(event.to_named_tuple())


def event_of(record: Any) -> dp_accounting.DpEvent:
    """Returns the event of a record.

    Args:
        record: what `event_record` returned.

    Returns:
        An event.

    Raises:
        ValueError: no event of dp-accounting.
    """
    fields = dict(_mapping("an event", record))
    kinds = vars(dp_accounting.dp_event) | {"KnownBranchDpEvent": KnownBranchDpEvent}
    kind = kinds.get(str(fields.pop("kind", None)))
    if not (isinstance(kind, type) and issubclass(kind, dp_accounting.DpEvent)):
        raise ValueError(f"{record!r} is no event of dp-accounting.")
    return kind(**{name: _event_value(value) for name, value in fields.items()})


def _event_record(value: Any) -> Any:
    if hasattr(value, "class_name"):
        names = [name for name in value._fields if name not in ("module_name", "class_name")]
        numbers = {name: _event_record(getattr(value, name)) for name in names}
        return {"kind": value.class_name, **numbers}
    if isinstance(value, list | tuple):
        return [_event_record(item) for item in value]
    return value


def _event_value(value: Any) -> Any:
    if isinstance(value, dict):
        return event_of(value)
    return [_event_value(item) for item in value] if isinstance(value, list) else value


def clip_record(clip: ClipRule) -> dict[str, Any]:
    """Returns the kind and the bound of a clip rule.

    Args:
        clip: one of `dpoptax.clipping`.

    Returns:
        What JSON can hold.

    Raises:
        TypeError: another.
    """
    if not isinstance(clip, FlatClip):
        raise TypeError(f"{type(clip).__name__} has no record; records exist for flat clips.")
    return {"kind": "flat", "l2_clip": number_record(clip.l2_clip)}


def clip_of(record: Any) -> ClipRule:
    """Returns the clip rule of a record.

    Args:
        record: what `clip_record` returned.

    Returns:
        A clip rule.

    Raises:
        ValueError: a record of no known kind.
    """
    fields = dict(_mapping("a clip", record))
    if fields.pop("kind", None) != "flat":
        raise ValueError(f"unknown clip {record!r}; expected one of kind 'flat'.")
    _only("a flat clip", fields, {"l2_clip"})
    return FlatClip(_number_of(fields["l2_clip"]))


def _number_of(record: Any) -> Scheduled:
    if isinstance(record, dict):
        _only("a schedule", record, {"values", "lengths"})
        return Schedule(tuple(record["values"]), tuple(record["lengths"]))
    return math.inf if record == "inf" else record


def _mapping(what: str, record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise ValueError(f"{what} is a JSON object; got {record!r}.")
    return record


def _kind_and_fields(what: str, record: Any, known: Iterable[str]) -> tuple[str, dict[str, Any]]:
    """Takes a record apart; refuses one of no known kind."""
    fields = dict(_mapping(f"a {what}", record))
    kind = fields.pop("kind", None)
    if kind not in known:
        raise ValueError(f"unknown {what} {kind!r}; expected one of {', '.join(known)}.")
    return kind, fields


def _only(what: str, record: dict[str, Any], names: set[str]) -> None:
    """Refuses a record that lacks a name or has one more."""
    if set(record) != names:
        lacking, beyond = sorted(names - set(record)), sorted(set(record) - names)
        raise ValueError(f"{what} lacks {lacking} and has {beyond} too many.")
