"""A low-pass filter of the released gradients, in place of momentum."""

import optax

from dpoptax.transforms import low_pass
from leaderboard.adult_network import train_network
from leaderboard.recipe import Recipe


def train(data, epsilon, delta, seed):
    optimizer = optax.chain(low_pass(), optax.sgd(3.0))
    return train_network(data, epsilon, delta, seed, optimizer)


RECIPE = Recipe(
    name="adult_network_low_pass",
    task="adult_optimizers",
    title="low-pass filter, SGD",
    tuned="on training examples held out",
    train=train,
    seconds=10,
)
