"""Keys: secret ones, one per purpose, split from one root."""

from dpoptax.random.chacha20 import CHACHA20 as CHACHA20
from dpoptax.random.domains import Keys as Keys
from dpoptax.random.domains import split_by_purpose as split_by_purpose
from dpoptax.random.exact import discrete_gaussian as discrete_gaussian
from dpoptax.random.keys import secure_key as secure_key
from dpoptax.random.keys import test_key as test_key
