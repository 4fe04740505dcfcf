"""Norm rules: squared norms of per-example gradients from inputs and cotangents.

`select.py` lists the rules and picks one per parameter leaf; every other rule file is one family of
algorithms.
"""

from dpoptax.per_example._norm_rules.base import NormRule as NormRule
from dpoptax.per_example._norm_rules.factors import Factors as Factors
from dpoptax.per_example._norm_rules.select import choose_rule as choose_rule
from dpoptax.per_example._norm_rules.select import is_materialized as is_materialized
from dpoptax.per_example._norm_rules.tied_embedding import TiedEmbedding as TiedEmbedding
from dpoptax.per_example._norm_rules.weighted import sum_weighted as sum_weighted
