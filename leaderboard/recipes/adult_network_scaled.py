"""Scale-then-privatize: Adam's scale, before the clip instead of after the noise."""

import optax

from dpoptax.transforms import scale_then_privatize
from leaderboard.adult_network import train_network
from leaderboard.recipe import Recipe


def train(data, epsilon, delta, seed):
    optimizer = scale_then_privatize(optax.adam(0.016), eps=0.3)
    return train_network(data, epsilon, delta, seed, optimizer)


RECIPE = Recipe(
    name="adult_network_scaled",
    task="adult_optimizers",
    title="scale-then-privatize, Adam",
    tuned="on training examples held out",
    train=train,
    seconds=10,
)
