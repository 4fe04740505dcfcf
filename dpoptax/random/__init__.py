"""PRNG keys: secret ones, one key per purpose, and exact discrete Gaussian draws."""

from dpoptax.random._chacha20 import CHACHA20
from dpoptax.random._derive import Keys, derive_key, split_by_purpose
from dpoptax.random._discrete_gaussian import discrete_gaussian
from dpoptax.random._keys import insecure_key, secure_key

__all__ = [
    "secure_key",
    "insecure_key",
    "split_by_purpose",
    "Keys",
    "derive_key",
    "discrete_gaussian",
    "CHACHA20",
]
