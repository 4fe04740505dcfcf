"""Private variational inference for NumPyro models and guides: pip install 'dpoptax[numpyro]'."""

from dpoptax.vi.numpyro._aligned import aligned_numpyro_elbo
from dpoptax.vi.numpyro._dpsvi import DPSVI
from dpoptax.vi.numpyro._elbo import numpyro_elbo
from dpoptax.vi.numpyro._predictive import Predictive

__all__ = ["DPSVI", "numpyro_elbo", "aligned_numpyro_elbo", "Predictive"]
