"""Private synthetic data from a table and its public schema.

Reference: McKenna, Miklau and Sheldon 2021, "Winning the NIST contest", arXiv:2108.04978.
"""

from dpoptax.synthetic._schema import Schema
from dpoptax.synthetic._synthesize import SyntheticData, synthesize

__all__ = ["synthesize", "Schema", "SyntheticData"]
