"""Families of distributions over a tree of latents, as small Flax modules."""

from dpoptax.vi.guides._constrained import constrained as Constrained
from dpoptax.vi.guides._normals import full_rank as FullRank
from dpoptax.vi.guides._normals import low_rank as LowRank
from dpoptax.vi.guides._normals import mean_field as MeanField
from dpoptax.vi.guides._parts import joint as Joint
from dpoptax.vi.guides._parts import point as Point

__all__ = ["Constrained", "FullRank", "Joint", "LowRank", "MeanField", "Point"]
