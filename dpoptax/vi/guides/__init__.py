"""Families of distributions over a tree of latents, as small Flax modules."""

from dpoptax.vi.guides.normals import full_rank as full_rank
from dpoptax.vi.guides.normals import low_rank as low_rank
from dpoptax.vi.guides.normals import mean_field as mean_field
from dpoptax.vi.guides.parts import joint as joint
from dpoptax.vi.guides.parts import point as point
from dpoptax.vi.guides.supports import constrained as constrained
