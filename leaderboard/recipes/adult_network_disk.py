"""DiSK: a Kalman filter, with gradients at an extrapolated point."""

import optax

from dpoptax.transforms import disk
from leaderboard.adult_network import train_network
from leaderboard.recipe import Recipe


def train(data, epsilon, delta, seed):
    optimizer = disk(optax.sgd(0.3, momentum=0.9))
    return train_network(data, epsilon, delta, seed, optimizer)


RECIPE = Recipe(
    name="adult_network_disk",
    task="adult_optimizers",
    title="DiSK, SGD",
    tuned="on training examples held out",
    train=train,
    seconds=10,
)
