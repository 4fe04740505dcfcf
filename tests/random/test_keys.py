"""The root key of a run: where it comes from, and what the report says about it."""

import jax
import pytest

from dpoptax.random import insecure_key
from dpoptax.random._keys import describe_key, root_key


def test_a_root_key_is_the_given_key_or_a_new_secure_one():
    key = jax.random.key(3)
    assert root_key(key) is key
    assert root_key(None) != root_key(None)


def test_the_report_names_the_prng_and_who_made_the_key():
    assert describe_key(None) == "ChaCha8, 256 bits of entropy of the operating system"
    assert describe_key(jax.random.key(3)).startswith("threefry2x32, with a key from the caller")
    assert describe_key(insecure_key(0, rounds=12)).startswith(
        "ChaCha12, with a key from the caller"
    )


def test_a_number_is_refused_with_what_to_pass():
    with pytest.raises(
        TypeError,
        match=r"got a number\. For a test pass jax.random.key\(number\).*leave the key out",
    ):
        root_key(7)
