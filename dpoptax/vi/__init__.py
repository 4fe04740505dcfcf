"""Variational inference: negative ELBOs whose gradients are made private, and what follows."""

from dpoptax.vi import guides as guides
from dpoptax.vi.elbo import local_elbo_loss as local_elbo_loss
from dpoptax.vi.global_elbo import AlignedElbo as AlignedElbo
from dpoptax.vi.global_elbo import GlobalElbo as GlobalElbo
from dpoptax.vi.global_elbo import aligned_elbo as aligned_elbo
from dpoptax.vi.global_elbo import global_elbo as global_elbo
