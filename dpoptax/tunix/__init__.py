"""Tunix: a `PeftTrainer` that trains privately: pip install 'dpoptax[tunix]'."""

from dpoptax.tunix._make_private import make_private

__all__ = ["make_private"]
