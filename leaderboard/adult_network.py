"""A network with one hidden layer on the bins of Adult, to compare optimizers on."""

from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn

import dpoptax
from leaderboard.recipe import Trained, plan_for
from leaderboard.recipes.adult_binned import features

NUM_STEPS = 400


class Network(nn.Module):
    @nn.compact
    def __call__(self, row):
        return nn.Dense(1)(nn.tanh(nn.Dense(32)(row)))[..., 0]


def loss_fn(params: Any, example: Any) -> jax.Array:
    """The cross-entropy of one row."""
    row, label = example
    return optax.sigmoid_binary_cross_entropy(Network().apply({"params": params}, row), label)


def train_network(
    data: Any, epsilon: float, delta: float, seed: int, optimizer: optax.GradientTransformation
) -> Trained:
    """Trains the network. Only the optimizer differs between the recipes that call this.

    Args:
        data: of Adult.
        epsilon: the budget; `math.inf` trains without noise.
        delta: of the budget.
        seed: of all keys.
        optimizer: what follows the private gradients. Its averaged parameters are scored if it
            keeps some, and the last ones otherwise.
    """
    rows, labels = features(data.columns, data.train_inputs), data.train_labels.astype(np.float32)
    plan = plan_for(num_examples=len(rows), expected_batch_size=2048, num_steps=NUM_STEPS,
                    epsilon=epsilon, delta=delta, clip=1.0)  # fmt: skip
    init_key, key = jax.random.split(jax.random.key(seed))
    result = dpoptax.training.fit(
        loss_fn, Network().init(init_key, rows[0])["params"], (rows, labels), plan=plan, key=key,
        optimizer=optimizer, progress=False,
    )  # fmt: skip
    params = result.params if result.averaged_params is None else result.averaged_params
    predict = jax.jit(lambda rows: Network().apply({"params": params}, rows))
    return Trained(
        lambda test: predict(features(data.columns, test)), params, result.epsilon(), result
    )
