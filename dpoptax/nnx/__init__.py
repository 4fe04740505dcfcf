"""Flax NNX: a model as the loss of one example, and an optimizer for its gradients."""

from dpoptax.nnx._loss import loss_fn
from dpoptax.nnx._optimizer import Optimizer

__all__ = ["loss_fn", "Optimizer"]
