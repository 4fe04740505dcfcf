"""The logistic regression of Adult: the suggested settings and an automatic clip rule."""

import jax.numpy as jnp
import numpy as np

from leaderboard.automatic import train_automatically
from leaderboard.recipe import Recipe, Trained
from leaderboard.recipes.adult_binned import features, logit, loss_fn


def train(data, epsilon, delta, seed):
    rows, labels = features(data.columns, data.train_inputs), data.train_labels.astype(np.float32)
    result = train_automatically(
        loss_fn,
        {"weights": jnp.zeros(rows.shape[1]), "bias": jnp.zeros(())},
        (rows, labels),
        epsilon,
        delta,
        seed,
    )
    params = result.averaged_params
    return Trained(
        lambda test: logit(params, features(data.columns, test)), params, result.epsilon(), result
    )


RECIPE = Recipe(
    name="adult_automatic",
    task="adult",
    title="logistic regression on bins, automatic clip and suggested settings",
    tuned="not at all",
    train=train,
    seconds=30,
)
