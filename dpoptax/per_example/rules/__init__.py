"""Norms from factors: one file per way in which a weight meets data."""

from dpoptax.per_example.rules.choice import choose_rule as choose_rule
from dpoptax.per_example.rules.choice import is_formed as is_formed
from dpoptax.per_example.rules.factors import Factors as Factors
from dpoptax.per_example.rules.rule import Rule as Rule
