"""Adam, which does not know about the noise, as a baseline."""

import optax

from leaderboard.adult_network import train_network
from leaderboard.recipe import Recipe


def train(data, epsilon, delta, seed):
    optimizer = optax.adam(0.016)
    return train_network(data, epsilon, delta, seed, optimizer)


RECIPE = Recipe(
    name="adult_network_adam",
    task="adult_optimizers",
    title="Adam",
    tuned="on training examples held out",
    train=train,
    seconds=10,
)
