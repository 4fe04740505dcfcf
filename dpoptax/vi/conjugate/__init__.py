"""Private sufficient statistics, and posteriors that know their noise, for conjugate models.

Each model releases its sufficient statistics once, with Gaussian noise. `release` charges a ledger,
and `posterior` samples the posterior given the noisy statistics, which is post-processing.
"""

from dpoptax.vi.conjugate._beta_bernoulli import BetaBernoulli
from dpoptax.vi.conjugate._dirichlet_multinomial import DirichletMultinomial
from dpoptax.vi.conjugate._linear_regression import LinearRegression
from dpoptax.vi.conjugate._normal import NormalMeanVariance
from dpoptax.vi.conjugate._release import NoisyStatistics

__all__ = [
    "LinearRegression",
    "NormalMeanVariance",
    "BetaBernoulli",
    "DirichletMultinomial",
    "NoisyStatistics",
]
