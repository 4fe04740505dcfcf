"""Scattering features with an automatic clip and suggested settings: no number is tuned."""

import jax
import jax.numpy as jnp
import optax

import dpoptax
from dpoptax.vi.contrib import average_iterates, polyak_average
from leaderboard.recipe import Recipe, Trained, plan_for
from leaderboard.recipes.mnist_scattering import rows_of


def logits(params, row):
    return row.astype(jnp.float32) @ params["weights"] + params["bias"]


def loss_fn(params, example):
    row, label = example
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, row), label)


def train(data, epsilon, delta, seed):
    rows = rows_of(data.train_inputs)
    params = {"weights": jnp.zeros((rows.shape[1], 10)), "bias": jnp.zeros(10)}
    suggested = dpoptax.suggest(
        num_examples=len(rows), epsilon=min(epsilon, 8.0), delta=delta,
        num_parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
    )  # fmt: skip
    plan = plan_for(
        num_examples=len(rows), expected_batch_size=suggested.expected_batch_size,
        num_steps=suggested.num_steps, epsilon=epsilon, delta=delta,
        clip=dpoptax.clipping.AutoSClip(),
    )  # fmt: skip
    average = average_iterates(start=plan.num_steps // 2)
    result = dpoptax.training.fit(
        loss_fn,
        params,
        (rows, data.train_labels),
        plan=plan,
        optimizer=optax.chain(optax.adam(suggested.learning_rate), average),
        key=jax.random.key(seed),
        progress=False,
    )
    params = polyak_average(result.state.opt_state)
    return Trained(lambda images: logits(params, rows_of(images)), params, result.epsilon())


RECIPE = Recipe(name="mnist_untuned", task="mnist", title="scattering features, nothing tuned",
                tuned="not at all", train=train, seconds=300)  # fmt: skip
