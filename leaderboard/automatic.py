"""Training with nothing tuned by hand: an automatic clip rule and the suggested settings."""

import math
from typing import Any

import jax
import numpy as np
import optax

import dpoptax
from dpoptax.training import FitResult
from dpoptax.transforms import average_params


def train_automatically(
    loss_fn: Any, params: Any, examples: Any, epsilon: float, delta: float, seed: int
) -> FitResult:
    """Trains with the settings of `dpoptax.suggest`, which reads public numbers only.

    Args:
        loss_fn: of one example.
        params: the initial parameters.
        examples: a tree of arrays with a leading axis for the examples.
        epsilon: the budget; `math.inf` trains with the settings of epsilon 8, without privacy.
        delta: of the budget.
        seed: of all keys.

    Returns:
        The result of `fit`. Its `averaged_params` are the mean over the second half of the steps.
    """
    suggestion = dpoptax.suggest(
        num_examples=len(jax.tree.leaves(examples)[0]),
        num_parameters=sum(np.size(leaf) for leaf in jax.tree.leaves(params)),
        epsilon=min(epsilon, 8.0),
        delta=delta,
    )
    plan = suggestion.plan()
    if math.isinf(epsilon):
        plan = plan.replace(clip=math.inf, noise_multiplier=0.0)
    return dpoptax.training.fit(
        loss_fn,
        params,
        examples,
        plan=plan,
        optimizer=optax.chain(
            optax.adam(suggestion.learning_rate), average_params(start=plan.num_steps // 2)
        ),
        key=jax.random.key(seed),
        progress=False,
    )
