"""Strict JAX for every test, and programs that many tests need compiled once."""

import os
import tempfile

# Before JAX is imported. Each process keeps programs of its own: one must not read what another
# has begun to write.
_COMPILED = tempfile.TemporaryDirectory(prefix="dpoptax-tests-", ignore_cleanup_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jax  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(autouse=True)
def _strict_dtype_promotion():
    """What a user's program may loosen must hold without loosening."""
    with jax.numpy_dtype_promotion("strict"):
        yield
