"""Audits: what a step may reveal, read from its program, and what attacks reached."""

from dpoptax._attacks import Audit, LowerBound
from dpoptax.audit._certificate import Certificate
from dpoptax.audit._certify import certify

__all__ = ["Audit", "Certificate", "LowerBound", "certify"]
