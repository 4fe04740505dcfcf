"""Two checks of privacy.

A certificate follows private data through the program of a step. An audit attacks a run, and says
which lower bound on epsilon the attack reached.
"""

from dpoptax._attacks import Audit, LowerBound
from dpoptax.audit._certificate import Certificate
from dpoptax.audit._certify import certify
from dpoptax.audit._gradient_canaries import GradientCanaries
from dpoptax.audit._input_canaries import InputCanaries
from dpoptax.audit._make_canaries import mislabelled, uniform_inputs
from dpoptax.audit._many_runs import audit_many_runs

__all__ = [
    "Audit",
    "Certificate",
    "GradientCanaries",
    "InputCanaries",
    "LowerBound",
    "audit_many_runs",
    "certify",
    "mislabelled",
    "uniform_inputs",
]
