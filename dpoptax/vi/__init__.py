"""Variational inference: negative ELBOs whose gradients are made private, and what follows."""

from dpoptax.vi import guides as guides
from dpoptax.vi import models as models
from dpoptax.vi.averaging import average_iterates as average_iterates
from dpoptax.vi.averaging import averaged as averaged
from dpoptax.vi.elbo import local_elbo_loss as local_elbo_loss
from dpoptax.vi.global_latents import AlignedElbo as AlignedElbo
from dpoptax.vi.global_latents import GlobalElbo as GlobalElbo
from dpoptax.vi.global_latents import aligned_elbo as aligned_elbo
from dpoptax.vi.global_latents import global_elbo as global_elbo
from dpoptax.vi.missing import observed_log_prob as observed_log_prob
from dpoptax.vi.natural import natural_gradient as natural_gradient
from dpoptax.vi.natural import preconditioned as preconditioned
from dpoptax.vi.natural import spread as spread
from dpoptax.vi.predictive import combine as combine
from dpoptax.vi.predictive import synthetic_data as synthetic_data
from dpoptax.vi.trace import noise_aware as noise_aware
from dpoptax.vi.trace import trace_gradients as trace_gradients
