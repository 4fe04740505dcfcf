"""d3p's modules under their own names, so that its scripts run with other imports.

`d3p.svi`, `d3p.minibatch`, `d3p.dputil`, `d3p.random`, `d3p.modelling`, `d3p.gmm`, `d3p.optimizers`
and `d3p.util` are here, with d3p's names and arguments. `import d3p.random` becomes
`from dpoptax.compat import d3p`. docs/from_d3p.md lists every name and what differs.

Reference: Prediger et al. 2022, arXiv:2103.11648.
"""

import importlib
from typing import Any

from dpoptax.compat.d3p import dputil, minibatch, optimizers, random, util
from dpoptax.compat.d3p.minibatch import (
    poisson_batchify_data,
    q_to_batch_size,
    subsample_batchify_data,
)

# Loaded at their first use, because they import NumPyro.
_NEED_NUMPYRO = ("gmm", "modelling", "svi")

__all__ = [
    "minibatch",
    "random",
    "dputil",
    "optimizers",
    "util",
    "poisson_batchify_data",
    "q_to_batch_size",
    "subsample_batchify_data",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name in _NEED_NUMPYRO:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
