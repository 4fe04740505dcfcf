"""Scattering features: the suggested settings and an automatic clip rule."""

import jax.numpy as jnp
import optax

from leaderboard.automatic import train_automatically
from leaderboard.recipe import Recipe, Trained
from leaderboard.recipes.mnist_scattering import rows_of


def logits(params, row):
    return row.astype(jnp.float32) @ params["weights"] + params["bias"]


def loss_fn(params, example):
    row, label = example
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, row), label)


def train(data, epsilon, delta, seed):
    rows = rows_of(data.train_inputs)
    result = train_automatically(
        loss_fn,
        {"weights": jnp.zeros((rows.shape[1], 10)), "bias": jnp.zeros(10)},
        (rows, data.train_labels),
        epsilon,
        delta,
        seed,
    )
    params = result.averaged_params
    return Trained(lambda images: logits(params, rows_of(images)), params, result.epsilon(), result)


RECIPE = Recipe(
    name="mnist_automatic",
    task="mnist",
    title="linear on scattering features, automatic clip and suggested settings",
    tuned="not at all",
    train=train,
    seconds=150,
)
