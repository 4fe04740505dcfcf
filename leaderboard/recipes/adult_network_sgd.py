"""Stochastic gradient descent with momentum, as a baseline."""

import optax

from leaderboard.adult_network import train_network
from leaderboard.recipe import Recipe


def train(data, epsilon, delta, seed):
    optimizer = optax.sgd(0.3, momentum=0.9)
    return train_network(data, epsilon, delta, seed, optimizer)


RECIPE = Recipe(
    name="adult_network_sgd",
    task="adult_optimizers",
    title="SGD with momentum",
    tuned="on training examples held out",
    train=train,
    seconds=10,
)
