"""Variational inference: negative ELBOs as losses of one example."""

from dpoptax.vi.elbo import local_elbo_loss as local_elbo_loss
