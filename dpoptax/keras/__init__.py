"""Keras 3 on JAX: a compiled model that trains privately: pip install 'dpoptax[keras]'."""

from dpoptax.keras._make_private import make_private

__all__ = ["make_private"]
