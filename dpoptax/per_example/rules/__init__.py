"""Norms from factors: one file per way in which a weight meets data."""

from dpoptax.per_example.rules.choice import Former as Former
from dpoptax.per_example.rules.choice import Rule as Rule
from dpoptax.per_example.rules.choice import choose_former as choose_former
from dpoptax.per_example.rules.choice import choose_rule as choose_rule
from dpoptax.per_example.rules.factors import Factors as Factors
from dpoptax.per_example.rules.factors import leaf_gradient as leaf_gradient
