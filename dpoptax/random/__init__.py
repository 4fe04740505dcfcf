"""PRNG keys: secret ones, and one key per purpose."""

from dpoptax.random._derive import derive_key, split_by_purpose
from dpoptax.random._key_data import key_data, wrap_key_data
from dpoptax.random._keys import insecure_key, secure_key

__all__ = [
    "secure_key",
    "insecure_key",
    "split_by_purpose",
    "derive_key",
    "key_data",
    "wrap_key_data",
]
