"""Differentially private training and Bayesian inference for JAX, built on Optax.

Sampler -> take -> per_example_grads -> privatize -> any Optax optimizer
   |                                        |
   +---------- Plan, accounting ------------+--> (epsilon, delta) report
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpoptax import (
        accounting,
        audit,
        clipping,
        keras,
        mechanisms,
        nnx,
        per_example,
        random,
        relations,
        reports,
        samplers,
        schedules,
        synthetic,
        training,
        transforms,
        tunix,
        vi,
    )
    from dpoptax._correlated_plan import correlated_plan
    from dpoptax._plan import Plan
    from dpoptax._suggest import Suggestion, suggest
    from dpoptax.audit import certify
    from dpoptax.per_example import (
        PerExampleGrads,
        average_views,
        explain,
        per_example_grads,
        value_and_per_example_grads,
    )
    from dpoptax.reports import Report
    from dpoptax.transforms import dp_adam, dp_sgd, privatize

    __version__: str

__all__ = [
    # Packages, in the order of the pipeline
    "samplers",
    "per_example",
    "clipping",
    "mechanisms",
    "transforms",
    "random",
    "relations",
    "schedules",
    "accounting",
    "reports",
    "training",
    "vi",
    "synthetic",
    "audit",
    "nnx",
    "keras",
    "tunix",
    # Functions and classes, in the same order
    "PerExampleGrads",
    "per_example_grads",
    "value_and_per_example_grads",
    "average_views",
    "explain",
    "privatize",
    "dp_sgd",
    "dp_adam",
    "suggest",
    "Suggestion",
    "Plan",
    "correlated_plan",
    "Report",
    "certify",
    "__version__",
]

# The module of each function and class. All other names of `__all__` are modules themselves.
_MODULES = {
    "PerExampleGrads": "dpoptax.per_example",
    "per_example_grads": "dpoptax.per_example",
    "value_and_per_example_grads": "dpoptax.per_example",
    "average_views": "dpoptax.per_example",
    "explain": "dpoptax.per_example",
    "privatize": "dpoptax.transforms",
    "dp_sgd": "dpoptax.transforms",
    "dp_adam": "dpoptax.transforms",
    "suggest": "dpoptax._suggest",
    "Suggestion": "dpoptax._suggest",
    "Plan": "dpoptax._plan",
    "correlated_plan": "dpoptax._correlated_plan",
    "Report": "dpoptax.reports",
    "certify": "dpoptax.audit",
}


def __getattr__(name: str) -> Any:
    # Everything is imported at its first use (PEP 562). dp-accounting, SciPy's statistics, Flax and
    # Orbax together take longer to import than JAX, and few programs need all of them.
    if name == "__version__":
        value = importlib.import_module("importlib.metadata").version("dpoptax")
    elif name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name]), name)
    elif name in __all__:
        return importlib.import_module(f"dpoptax.{name}")
    else:
        raise AttributeError(
            f"module 'dpoptax' has no attribute {name!r}. fit, PrivateRun and Every are in "
            "dpoptax.training; dir(dpoptax) lists all names."
        )
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    # Tab completion shows what is public, and not what this file imports.
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
