"""Audits: what a step may reveal, read from its program."""

from dpoptax.audit._certificate import Certificate
from dpoptax.audit._certify import certify

__all__ = ["Certificate", "certify"]
