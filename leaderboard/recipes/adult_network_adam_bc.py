"""DP-AdamBC: Adam without the variance of the noise in the second moment."""

import optax

from dpoptax.transforms import scale_by_adam_bc
from leaderboard.adult_network import train_network
from leaderboard.recipe import Recipe


def train(data, epsilon, delta, seed):
    optimizer = optax.chain(scale_by_adam_bc(), optax.scale_by_learning_rate(0.004))
    return train_network(data, epsilon, delta, seed, optimizer)


RECIPE = Recipe(
    name="adult_network_adam_bc",
    task="adult_optimizers",
    title="DP-AdamBC",
    tuned="on training examples held out",
    train=train,
    seconds=10,
)
