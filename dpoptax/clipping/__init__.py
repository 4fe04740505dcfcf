"""Clip rules: how much of each example's gradient enters the sum."""

from dpoptax import _serialize
from dpoptax.clipping._base import ClipRule
from dpoptax.clipping._flat import FlatClip
from dpoptax.clipping._quantile import QuantileClip
from dpoptax.clipping._state import StatefulClipRule

# What JSON can hold. A new clip rule joins by one line.
_serialize.register(FlatClip)
_serialize.register(QuantileClip)
_serialize.register_interface(ClipRule, describe_by=("l2_clip",))
_serialize.register_interface(StatefulClipRule, describe_by=("count_noise",))

__all__ = ["ClipRule", "FlatClip", "QuantileClip", "StatefulClipRule"]
