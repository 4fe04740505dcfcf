"""Differentially private training and Bayesian inference for JAX, in Optax's own shape.

Sampler -> take -> per_example_grads -> privatize -> any Optax optimizer
   |                                        |
   +---------- Plan, accounting ------------+--> (epsilon, delta) report
"""

from importlib.metadata import version as _version

from dpoptax import (
    accounting,
    clipping,
    mechanisms,
    per_example,
    random,
    relations,
    reports,
    samplers,
    schedules,
    training,
    transforms,
    vi,
)
from dpoptax._plan import Plan
from dpoptax.per_example import (
    PerExampleGrads,
    explain,
    per_example_grads,
    value_and_per_example_grads,
)
from dpoptax.reports import Report
from dpoptax.transforms import PrivatizeState, dp_adam, dp_sgd, privatize

__version__ = _version("dpoptax")

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
    # Functions and classes, in the same order
    "PerExampleGrads",
    "per_example_grads",
    "value_and_per_example_grads",
    "explain",
    "PrivatizeState",
    "privatize",
    "dp_sgd",
    "dp_adam",
    "Plan",
    "Report",
    "__version__",
]
