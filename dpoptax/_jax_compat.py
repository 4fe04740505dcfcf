"""The only module that uses `jax.extend`, so that a change of JAX is met in one place."""

from jax.extend.random import define_prng_impl

__all__ = ["define_prng_impl"]
