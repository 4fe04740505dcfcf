"""Table of linear primitives. To add one, write its file and add one line here."""

from collections.abc import Iterable
from typing import Any

from dpoptax.per_example._primitives.add import ADD
from dpoptax.per_example._primitives.base import LinearPrimitive as LinearPrimitive
from dpoptax.per_example._primitives.convolution import CONVOLUTION
from dpoptax.per_example._primitives.dot_general import DOT_GENERAL
from dpoptax.per_example._primitives.gather import GATHER

_TABLE = {
    entry.primitive: entry
    for entry in (
        DOT_GENERAL,
        CONVOLUTION,
        GATHER,
        ADD,
    )
}


def linear_primitive(primitive: Any) -> LinearPrimitive | None:
    """Returns the entry of a JAX primitive, or None if it is not in the table."""
    return _TABLE.get(primitive)


def may_spread_nan(equations: Iterable[Any]) -> bool:
    """Whether `vmap` of these equations may spread NaN from one example to others."""
    entries = (linear_primitive(eqn.primitive) for eqn in equations)
    return any(entry is not None and entry.spreads_nan for entry in entries)
