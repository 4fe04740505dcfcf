"""Norms from factors: one file per way in which a weight meets data."""

from dpoptax.per_example._norm_rules.base import NormRule as NormRule
from dpoptax.per_example._norm_rules.factors import Factors as Factors
from dpoptax.per_example._norm_rules.select import choose_rule as choose_rule
from dpoptax.per_example._norm_rules.select import is_materialized as is_materialized
