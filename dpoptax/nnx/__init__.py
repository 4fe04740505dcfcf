"""Flax NNX: a model as a loss of parameters, one example and a key."""

from dpoptax.nnx._loss import loss_fn

__all__ = ["loss_fn"]
