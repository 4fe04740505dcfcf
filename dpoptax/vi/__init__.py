"""Variational inference: negative ELBOs whose gradients are made private, and what follows."""

from dpoptax.vi import guides, models
from dpoptax.vi._global_elbo import AlignedElbo, GlobalElbo, aligned_elbo, global_elbo
from dpoptax.vi._local_elbo import local_elbo_loss
from dpoptax.vi._missing import observed_log_prob
from dpoptax.vi._predictive import combine, synthetic_data
from dpoptax.vi.contrib._averaging import average_iterates, averaged
from dpoptax.vi.contrib._gradient_trace import noise_aware_posterior, trace_gradients
from dpoptax.vi.contrib._natural_gradient import natural_gradient, preconditioned, spread

__all__ = [
    "AlignedElbo",
    "GlobalElbo",
    "aligned_elbo",
    "average_iterates",
    "averaged",
    "combine",
    "global_elbo",
    "guides",
    "local_elbo_loss",
    "models",
    "natural_gradient",
    "noise_aware_posterior",
    "observed_log_prob",
    "preconditioned",
    "spread",
    "synthetic_data",
    "trace_gradients",
]
