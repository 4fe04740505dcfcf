"""Clip rules: how much of each example's gradient enters the sum."""

from dpoptax.clipping._base import ClipRule
from dpoptax.clipping._flat import FlatClip

__all__ = ["ClipRule", "FlatClip"]
