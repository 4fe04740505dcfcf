"""Keys: secret ones, one per purpose, split from one root."""

from dpoptax.random._chacha20 import CHACHA20
from dpoptax.random._derive import Keys, split_by_purpose
from dpoptax.random._discrete_gaussian import discrete_gaussian
from dpoptax.random._keys import insecure_key, secure_key

__all__ = [
    "CHACHA20",
    "Keys",
    "discrete_gaussian",
    "insecure_key",
    "secure_key",
    "split_by_purpose",
]
