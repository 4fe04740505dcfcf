"""Strategies: how the noise of a step depends on the noise of earlier steps."""

from dpoptax import _serialize
from dpoptax._patterns import Cyclic, OncePerRound, Separated
from dpoptax.mechanisms.strategies import _streaming
from dpoptax.mechanisms.strategies._banded_inverse import BandedInverse
from dpoptax.mechanisms.strategies._banded_toeplitz import BandedToeplitz
from dpoptax.mechanisms.strategies._buffered_toeplitz import BufferedToeplitz
from dpoptax.mechanisms.strategies._dense import DenseStrategy
from dpoptax.mechanisms.strategies._error import prefix_sum_error
from dpoptax.mechanisms.strategies._sensitivity import sensitivity
from dpoptax.mechanisms.strategies._streaming import StreamingStrategy

# What JSON can hold. A new strategy joins by one line.
_serialize.register(BandedToeplitz)
_serialize.register(BandedInverse)
_serialize.register(BufferedToeplitz)
_serialize.register(DenseStrategy)
_serialize.register(StreamingStrategy, names=("num_steps", "digest"), make=_streaming.no_record)

__all__ = [
    # Strategies
    "BandedToeplitz",
    "BandedInverse",
    "BufferedToeplitz",
    "DenseStrategy",
    "StreamingStrategy",
    # What they cost and what they gain
    "sensitivity",
    "Separated",
    "Cyclic",
    "OncePerRound",
    "prefix_sum_error",
]
