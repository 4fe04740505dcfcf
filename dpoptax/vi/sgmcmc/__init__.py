"""Stochastic gradient MCMC on private gradients, by BlackJAX: pip install 'dpoptax[blackjax]'.

A kernel is an Optax optimizer that follows `privatize`: each step of the plan is one step of the
chain, so every gradient is clipped, noised and charged as in any other run.
"""

from dpoptax.vi.sgmcmc._grad_estimator import GradEstimator
from dpoptax.vi.sgmcmc._kernels import SGHMC, SGLD, SGNHT
from dpoptax.vi.sgmcmc._sample import Chain, sample

__all__ = ["SGLD", "SGHMC", "SGNHT", "sample", "Chain", "GradEstimator"]
