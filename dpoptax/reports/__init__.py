"""Privacy reports: what a plan or a run guarantees, in numbers and in words."""

from dpoptax.reports._report import Report
from dpoptax.reports._round import round_up

__all__ = ["Report", "round_up"]
