"""The linear model of hashed words: the suggested settings and an automatic clip rule."""

import jax.numpy as jnp

from leaderboard.automatic import train_automatically
from leaderboard.recipe import Recipe, Trained
from leaderboard.recipes.newsgroups_hashed import features, logits, loss_fn


def train(data, epsilon, delta, seed):
    rows, labels = features(data.train_inputs), data.train_labels
    result = train_automatically(
        loss_fn, {"weights": jnp.zeros((rows.shape[1], 20))}, (rows, labels), epsilon, delta, seed
    )
    params = result.averaged_params
    return Trained(lambda test: logits(params, features(test)), params, result.epsilon(), result)


RECIPE = Recipe(
    name="newsgroups_automatic",
    task="newsgroups",
    title="linear model on hashed words, automatic clip and suggested settings",
    tuned="not at all",
    train=train,
    seconds=60,
)
