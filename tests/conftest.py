"""Strict JAX for every test: what a user's program may loosen must hold without loosening."""

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(autouse=True)
def _names_in_doctests(doctest_namespace):
    doctest_namespace["jax"] = jax
