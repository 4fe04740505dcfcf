"""Clip rules: how much of each example's gradient enters the sum."""

from dpoptax import _serialize
from dpoptax.clipping._base import ClipRule
from dpoptax.clipping._flat import FlatClip

# What JSON can hold. A new clip rule joins by one line.
_serialize.register(FlatClip)
_serialize.register_interface(ClipRule, describe_by=("l2_clip",))

__all__ = ["ClipRule", "FlatClip"]
