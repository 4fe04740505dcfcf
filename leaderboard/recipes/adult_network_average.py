"""Momentum, and the mean of the parameters over the second half of the steps."""

import optax

from dpoptax.transforms import average_params
from leaderboard.adult_network import NUM_STEPS, train_network
from leaderboard.recipe import Recipe


def train(data, epsilon, delta, seed):
    optimizer = optax.chain(optax.sgd(0.5, momentum=0.9), average_params(start=NUM_STEPS // 2))
    return train_network(data, epsilon, delta, seed, optimizer)


RECIPE = Recipe(
    name="adult_network_average",
    task="adult_optimizers",
    title="SGD with momentum, parameters averaged",
    tuned="on training examples held out",
    train=train,
    seconds=10,
)
