"""Audits: what a step may reveal, read from its program, and what attacks reached."""

from dpoptax._attacks import Audit, LowerBound
from dpoptax.audit._certificate import Certificate
from dpoptax.audit._certify import certify
from dpoptax.audit._gradient_canaries import GradientCanaries

__all__ = ["Audit", "Certificate", "GradientCanaries", "LowerBound", "certify"]
