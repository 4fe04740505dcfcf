"""Threefry with unrolled rounds gives the same numbers as JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpoptax.random import insecure_key as chacha20_key
from dpoptax.random._threefry_unrolled import UNROLLED, mix, rolled, unrolled


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_the_published_vectors(counter, key, expected):
    """The known answers that come with the authors' code, for 20 rounds."""
    found = mix(jnp.array(key, jnp.uint32), *(jnp.uint32(word) for word in counter))
    assert tuple(int(word) for word in found) == expected


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5), (2, 1, 129), (300, 300)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16])
def test_the_same_numbers_as_jax(shape, dtype):
    with jax.enable_x64(True):
        key = jax.random.key(5)
        found = jax.random.normal(unrolled(key), shape, dtype)
        np.testing.assert_array_equal(found, jax.random.normal(key, shape, dtype))


def test_the_same_numbers_under_vmap_and_for_arrays_of_keys():
    keys = jax.random.split(jax.random.key(1), 4)
    found = jax.jit(jax.vmap(lambda key: jax.random.bits(unrolled(key), (33,))))(keys)
    expected = jax.vmap(lambda key: jax.random.bits(key, (33,)))(keys)
    np.testing.assert_array_equal(found, expected)


def test_other_keys_are_returned_unchanged():
    key = chacha20_key(0)
    assert unrolled(key) is key


@pytest.mark.parametrize("number", [0, 3, 2**32 - 1])
def test_the_same_keys_as_jax(number):
    def derived(key):
        key = jax.random.fold_in(key, np.uint32(number))
        return jax.random.key_data(jax.random.split(jax.random.split(key, (2, 3))[1, 2]))

    key = jax.random.key(4)
    np.testing.assert_array_equal(jax.jit(derived)(unrolled(key)), derived(key))


def test_rolled_undoes_unrolled():
    key = jax.random.key(4)
    assert rolled(unrolled(key)) == key
    assert rolled(key) is key


def test_an_unrolled_key_is_not_made_from_a_seed():
    with pytest.raises(TypeError, match="is made from another key"):
        jax.random.key(0, impl=UNROLLED)
