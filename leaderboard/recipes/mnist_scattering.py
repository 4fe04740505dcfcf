"""A linear model on scattering features, which nothing is learnt for (arXiv:2011.11660)."""

import jax
import jax.numpy as jnp
import optax

import dpoptax
from dpoptax.vi.contrib import average_iterates, polyak_average
from leaderboard.recipe import Recipe, Trained, plan_for
from leaderboard.scattering import features

STEPS = 300


def logits(params, rows):
    return rows.astype(jnp.float32) @ params["weights"] + params["bias"]


def loss_fn(params, example):
    row, label = example
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, row), label)


def rows_of(images):
    return features(images, groups=27).reshape(len(images), -1)


def train(data, epsilon, delta, seed):
    rows = rows_of(data.train_inputs)
    plan = plan_for(num_examples=len(rows), expected_batch_size=len(rows) / 7, num_steps=STEPS,
                    epsilon=epsilon, delta=delta, clip=1.0)  # fmt: skip
    result = dpoptax.training.fit(
        loss_fn,
        {"weights": jnp.zeros((rows.shape[1], 10)), "bias": jnp.zeros(10)},
        (rows, data.train_labels),
        plan=plan,
        optimizer=optax.chain(optax.sgd(2.0, momentum=0.9), average_iterates(start=STEPS // 2)),
        key=jax.random.key(seed),
        progress=False,
    )
    params = polyak_average(result.state.opt_state)
    return Trained(lambda images: logits(params, rows_of(images)), params, result.epsilon())


RECIPE = Recipe(name="mnist_scattering", task="mnist", title="linear on scattering features",
                tuned="on training examples held out", train=train, seconds=300)  # fmt: skip
