"""Privacy reports: what a run guarantees, in numbers and in words."""

from dpoptax.reports._report import Report, round_up

__all__ = ["Report", "round_up"]
