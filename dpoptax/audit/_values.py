"""What is known about single values: whole numbers, equal elements, masks, and zero padding."""

import operator
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from dpoptax.audit._labels import Label
from dpoptax.audit._origins import Number
from dpoptax.audit._row_rules import KEEPS_ZERO

_RESHAPES = {"reshape", "broadcast_in_dim", "squeeze", "transpose", "convert_element_type"}
_OF_BOOLS: dict[str, Callable[[Any, Any], Any]] = {"and": operator.and_, "or": operator.or_}


def of_number(value: Any) -> Label:
    """Returns the label of a number that is written in the program."""
    number = None
    if (isinstance(value, int | np.integer) and not isinstance(value, bool | np.bool_)) or (
        isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.integer)
    ):
        number = Number(offset=int(value)).in_32_bits()
    return Label(uniform=value.item() if hasattr(value, "item") else value, number=number)


def counts(dtype: Any) -> bool:
    """Whether numbers of a type can count the steps of a run; narrow ones wrap around."""
    return jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits >= 32


def number_of(eqn: Any, labels: list[Label]) -> Number | None:
    """Returns the whole number that an equation computes, if it is known."""
    number = _number_of(eqn, labels)
    return None if number is None else number.in_32_bits()


def _number_of(eqn: Any, labels: list[Label]) -> Number | None:
    name, aval = eqn.primitive.name, eqn.outvars[0].aval if eqn.outvars else None
    if aval is None or aval.size != 1 or not counts(aval.dtype):
        return None
    numbers = [label.number for label in labels]
    if name in _RESHAPES and numbers:
        return numbers[0]
    if len(numbers) != 2 or numbers[0] is None or numbers[1] is None:
        return None
    if name in ("add", "sub"):
        return numbers[0].plus(numbers[1], 1 if name == "add" else -1)
    if name == "mul" and any(not one.terms for one in numbers if one is not None):
        constant, other = sorted(numbers, key=lambda one: len(one.terms) if one else 0)
        assert constant is not None
        assert other is not None
        return Number().plus(other, constant.offset)
    return None


def uniform_of(eqn: Any, labels: list[Label]) -> Any:
    """Returns the value of all elements of the output, if they are equal and known."""
    name, values = eqn.primitive.name, [label.uniform for label in labels]
    if name == "convert_element_type" and values:
        return _converted(values[0], eqn.outvars[0].aval.dtype)
    if name in _RESHAPES and values:
        return values[0]
    if name in _OF_BOOLS and len(values) == 2 and all(isinstance(one, bool) for one in values):
        return _OF_BOOLS[name](*values)
    return None


def _converted(value: Any, dtype: Any) -> Any:
    """Returns a value in another type, if it is the same there: narrow types wrap around."""
    if not isinstance(value, bool | int | float) or not jnp.isdtype(dtype, ("bool", "numeric")):
        return None
    found = np.asarray(value).astype(dtype).item()
    return found if found == value else None


def mark_of(eqn: Any, labels: list[Label]) -> str | None:
    """Returns `mask` if the output is False wherever the mask of the batch is."""
    name, dtype = eqn.primitive.name, eqn.outvars[0].aval.dtype
    masked = [label.mark == "mask" for label in labels]
    if dtype != jnp.bool_ or not masked:
        return None
    keeps = any(masked) if name == "and" else name in _RESHAPES and masked[0]
    return "mask" if keeps else None


def has_zero_padding(eqn: Any, labels: list[Label]) -> bool:
    """Whether the output is zero in padded rows."""
    name = eqn.primitive.name
    zero = [label.zero_padding or is_zero(label) for label in labels]
    if name == "select_n" and len(labels) == 3:
        chosen_by_mask = labels[0].mark == "mask"
        return zero[1] and (zero[2] or chosen_by_mask)
    if name == "mul":
        return any(zero)
    if name in ("add", "sub", "add_any"):
        return all(zero)
    return bool(zero) and zero[0] and (name == "div" or name in KEEPS_ZERO)


def is_zero(label: Label) -> bool:
    """Whether a value is zero in all elements."""
    return isinstance(label.uniform, int | float) and label.uniform == 0
