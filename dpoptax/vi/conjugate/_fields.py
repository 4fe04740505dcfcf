"""Checks of the fields of conjugate models."""

from typing import Any

import attrs

from dpoptax import _validate


def number(value: float) -> float:
    """Returns a real number as a float."""
    return _validate.real("each bound and each parameter of the prior", value)


def is_positive(instance: Any, attribute: "attrs.Attribute[float]", value: float) -> None:
    """Raises unless a field is positive."""
    del instance
    _validate.positive(attribute.name, value)
