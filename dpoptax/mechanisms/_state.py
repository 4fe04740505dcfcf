"""Mechanisms with state: a placeholder for the type of any mechanism."""

from typing import TypeAlias

from dpoptax.mechanisms._base import Mechanism

AnyMechanism: TypeAlias = Mechanism
