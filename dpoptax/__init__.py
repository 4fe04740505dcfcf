"""Differentially private training and Bayesian inference for JAX, in Optax's own shape.

Sampler -> take -> per_example_grads -> privatize -> any Optax optimizer
   |                                        |
   +---------- Plan, accounting ------------+--> (epsilon, delta) report
"""

from importlib.metadata import version as _version

# 1, 6: who takes part, and what it costs
from dpoptax import accounting as accounting
from dpoptax import clipping as clipping
from dpoptax import mechanisms as mechanisms
from dpoptax import random as random
from dpoptax import readings as readings
from dpoptax import samplers as samplers
from dpoptax import training as training
from dpoptax import vi as vi

# 3, 4: clip, sum, noise, divide
from dpoptax.aggregation import PrivatizeState as PrivatizeState
from dpoptax.aggregation import privatize as privatize

# 5: aliases that only compose
from dpoptax.optimizers import dp_adam as dp_adam
from dpoptax.optimizers import dp_sgd as dp_sgd

# 2: a loss becomes per-example gradients
from dpoptax.per_example import PerExampleGrads as PerExampleGrads
from dpoptax.per_example import explain as explain
from dpoptax.per_example import per_example_grads as per_example_grads
from dpoptax.per_example import value_and_per_example_grads as value_and_per_example_grads

# All of it as one frozen value
from dpoptax.plan import Plan as Plan

__version__ = _version("dpoptax")
