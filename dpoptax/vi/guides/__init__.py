"""Guides: families of distributions over a tree of latents, as Flax modules."""

from dpoptax.vi.guides._base import Guide
from dpoptax.vi.guides._constrained import Constrained
from dpoptax.vi.guides._full_rank import FullRank
from dpoptax.vi.guides._joint import Joint
from dpoptax.vi.guides._low_rank import LowRank
from dpoptax.vi.guides._mean_field import MeanField
from dpoptax.vi.guides._point import Point

__all__ = ["Guide", "MeanField", "FullRank", "LowRank", "Point", "Joint", "Constrained"]
