"""Private variational inference for NumPyro models and guides: pip install 'dpoptax[numpyro]'."""

from dpoptax.vi.numpyro._dpsvi import DPSVI
from dpoptax.vi.numpyro._elbo import NumPyroElbo, numpyro_elbo
from dpoptax.vi.numpyro._state import SVIRunResult, SVIState

__all__ = ["DPSVI", "NumPyroElbo", "SVIRunResult", "SVIState", "numpyro_elbo"]
