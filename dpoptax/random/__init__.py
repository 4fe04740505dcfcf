"""Keys: one per purpose, split from one root."""

from dpoptax.random.domains import Keys as Keys
from dpoptax.random.domains import split_by_purpose as split_by_purpose
