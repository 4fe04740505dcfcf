"""Clip rules: how much of each example's gradient enters the sum."""

from dpoptax import _serialize
from dpoptax.clipping._auto_s import AutoSClip
from dpoptax.clipping._base import ClipRule
from dpoptax.clipping._flat import FlatClip
from dpoptax.clipping._group import GroupClip
from dpoptax.clipping._normalized import NormalizedClip
from dpoptax.clipping._per_layer import PerLayerClip
from dpoptax.clipping._psac import PsacClip
from dpoptax.clipping._quantile import QuantileClip
from dpoptax.clipping._state import StatefulClipRule

# What JSON can hold. A new clip rule joins by one line.
_serialize.register(FlatClip)
_serialize.register(PerLayerClip, ("l2_clip", "sizes"))
_serialize.register(GroupClip, ("bounds",))
_serialize.register(AutoSClip)
_serialize.register(PsacClip)
_serialize.register(NormalizedClip)
_serialize.register(QuantileClip)
_serialize.register_interface(ClipRule, describe_by=("l2_clip",))
_serialize.register_interface(StatefulClipRule, describe_by=("count_noise",))

__all__ = [
    "ClipRule",
    "FlatClip",
    "PerLayerClip",
    "GroupClip",
    "AutoSClip",
    "PsacClip",
    "NormalizedClip",
    "StatefulClipRule",
    "QuantileClip",
]
