"""Variational inference: negative ELBOs as objectives for private training.

`guides`, `models` and `numpyro` are loaded when they are used: they import Flax and NumPyro.
"""

import importlib
from typing import TYPE_CHECKING, Any

from dpoptax.vi import contrib
from dpoptax.vi._aligned_elbo import aligned_elbo
from dpoptax.vi._calibrated_posterior import calibrated_posterior
from dpoptax.vi._calibration_check import calibration_check
from dpoptax.vi._choose_clip import choose_clip
from dpoptax.vi._global_elbo import global_elbo
from dpoptax.vi._local_elbo import local_elbo_loss
from dpoptax.vi._missing import observed_log_prob
from dpoptax.vi._predictive import synthetic_data

if TYPE_CHECKING:
    from dpoptax.vi import guides as guides
    from dpoptax.vi import models as models
    from dpoptax.vi import numpyro as numpyro

__all__ = [
    "guides",
    "models",
    "contrib",
    "local_elbo_loss",
    "global_elbo",
    "aligned_elbo",
    "choose_clip",
    "calibrated_posterior",
    "calibration_check",
    "observed_log_prob",
    "synthetic_data",
]

# `numpyro` is not in `__all__`: a star import must not need an optional dependency.
_LAZY = ("guides", "models", "numpyro")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"dpoptax.vi.{name}")
    raise AttributeError(f"module 'dpoptax.vi' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
