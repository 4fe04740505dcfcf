"""What attacks reached: scores of canaries, and the lower bounds on epsilon that follow.

`dpoptax.audit` exports the public names. They are here because `training` makes an `Audit`.
"""

from dpoptax._attacks._audit import Audit
from dpoptax._attacks._lower_bound import LowerBound

__all__ = ["Audit", "LowerBound"]
