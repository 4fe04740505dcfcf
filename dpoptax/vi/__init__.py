"""Variational inference, and other private posteriors.

Negative ELBOs are objectives for private training. `conjugate` has private sufficient statistics,
and `sgmcmc` samplers that take noisy gradients. Submodules are loaded when they are used: some
import Flax, NumPyro or BlackJAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

from dpoptax.vi import contrib
from dpoptax.vi._aligned_elbo import aligned_elbo
from dpoptax.vi._arviz import to_arviz
from dpoptax.vi._calibrated_posterior import calibrated_posterior
from dpoptax.vi._calibration_check import calibration_check
from dpoptax.vi._choose_clip import choose_clip
from dpoptax.vi._global_elbo import global_elbo
from dpoptax.vi._local_elbo import local_elbo_loss
from dpoptax.vi._missing import observed_log_prob
from dpoptax.vi._predictive import synthetic_data
from dpoptax.vi._predictive_check import nonprivate_predictive_check, predictive_check

if TYPE_CHECKING:
    from dpoptax.vi import conjugate as conjugate
    from dpoptax.vi import guides as guides
    from dpoptax.vi import models as models
    from dpoptax.vi import numpyro as numpyro
    from dpoptax.vi import sgmcmc as sgmcmc

__all__ = [
    "guides",
    "models",
    "contrib",
    "conjugate",
    "sgmcmc",
    "local_elbo_loss",
    "global_elbo",
    "aligned_elbo",
    "choose_clip",
    "calibrated_posterior",
    "calibration_check",
    "observed_log_prob",
    "synthetic_data",
    "predictive_check",
    "nonprivate_predictive_check",
    "to_arviz",
]

# `numpyro` is not in `__all__`: a star import must not need an optional dependency.
_LAZY = ("conjugate", "guides", "models", "numpyro", "sgmcmc")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"dpoptax.vi.{name}")
    raise AttributeError(f"module 'dpoptax.vi' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
