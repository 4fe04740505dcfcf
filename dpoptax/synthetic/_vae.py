"""The latent-variable route: a variational autoencoder of cells, trained privately.

Each column has a softmax over its cells given the latent. A missing value is not a cell here. It
has no term in the likelihood of values. A Bernoulli variable of each column says what is missing.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from dpoptax import training
from dpoptax._plan import Plan
from dpoptax._pytree import PyTree
from dpoptax.random._derive import derive_key
from dpoptax.reports import Report
from dpoptax.synthetic._columns import Column
from dpoptax.vi import local_elbo_loss, observed_log_prob

LATENT, HIDDEN = 8, 64
EPOCHS = 30
# A batch of about this part of the rows; larger batches need less noise per example.
BATCHES_PER_EPOCH = 30
LEARNING_RATE = 3e-3
LOWEST = -1e9


class Layout:
    """Where the cells of each column stand in a flat vector of indicators."""

    def __init__(self, columns: Mapping[str, Column]) -> None:
        self.sizes = [column.num_cells - column.missing for column in columns.values()]
        self.may_miss = np.array([column.missing for column in columns.values()])
        self.width = max(self.sizes)
        self.valid = np.arange(self.width) < np.array(self.sizes)[:, None]

    def indicators(self, cells: Float[Array, " columns"]) -> Float[Array, " inputs"]:
        """Returns one-hot cells, where a missing value has none."""
        return jax.nn.one_hot(cells.astype(jnp.int32), self.width)[self.valid]

    def log_shares(self, outputs: Float[Array, " outputs"]) -> Float[Array, "columns width"]:
        """Returns log probabilities of cells."""
        logits = jnp.full(self.valid.shape, LOWEST).at[np.nonzero(self.valid)].set(outputs)
        return jax.nn.log_softmax(logits, axis=1)


def _dense(key: PRNGKeyArray, inputs: int, outputs: int) -> dict[str, Array]:
    weights = jax.random.normal(key, (inputs, outputs)) / math.sqrt(inputs)
    return {"w": weights, "b": jnp.zeros(outputs)}


def _apply(layer: Mapping[str, Array], x: Array) -> Array:
    return x @ layer["w"] + layer["b"]


def initial(layout: Layout, key: PRNGKeyArray) -> PyTree:
    """Returns parameters that do not depend on the data."""
    keys = jax.random.split(key, 5)
    inputs = int(layout.valid.sum())
    return {
        "encoder": _dense(keys[0], inputs, HIDDEN),
        "posterior": _dense(keys[1], HIDDEN, 2 * LATENT),
        "decoder": _dense(keys[2], LATENT, HIDDEN),
        "cells": _dense(keys[3], HIDDEN, inputs),
        "missing": _dense(keys[4], HIDDEN, len(layout.sizes)),
    }


def loss_of(layout: Layout) -> Any:
    """Returns the negative ELBO of one row; a missing value is -1."""

    def encode(params: PyTree, row: Array) -> tuple[Array, Array]:
        hidden = jnp.tanh(_apply(params["encoder"], layout.indicators(row)))
        loc, raw = jnp.split(_apply(params["posterior"], hidden), 2)
        return loc, jax.nn.softplus(raw) + 1e-3

    def log_likelihood(params: PyTree, latent: Array, row: Array) -> Array:
        hidden = jnp.tanh(_apply(params["decoder"], latent))
        shares = layout.log_shares(_apply(params["cells"], hidden))

        def log_prob(cells: Array) -> Array:
            return jnp.take_along_axis(shares, cells.astype(jnp.int32)[:, None], axis=1)[:, 0]

        missing = _apply(params["missing"], hidden)
        sign = jnp.where(row < 0, 1.0, -1.0)
        of_missing = jnp.where(layout.may_miss, jax.nn.log_sigmoid(sign * missing), 0.0)
        return observed_log_prob(log_prob, row, row >= 0) + of_missing.sum()

    return local_elbo_loss(encode, log_likelihood)


def train(
    cells: Mapping[str, np.ndarray],
    columns: Mapping[str, Column],
    epsilon: float,
    delta: float,
    key: PRNGKeyArray,
) -> tuple[Layout, PyTree, Report]:
    """Returns trained parameters and the report of the run. The number of rows is public here."""
    layout = Layout(columns)
    rows = np.stack(
        [
            np.where(cells[name] < size, cells[name], -1)
            for (name, _), size in zip(columns.items(), layout.sizes, strict=True)
        ],
        axis=1,
    ).astype(np.float32)
    plan = Plan.calibrate(
        num_examples=len(rows),
        expected_batch_size=max(len(rows) / BATCHES_PER_EPOCH, 1.0),
        clip=1.0,
        epochs=EPOCHS,
        epsilon=epsilon,
        delta=delta,
    )
    result = training.fit(
        loss_of(layout),
        initial(layout, derive_key(key, "initial parameters")),
        rows,
        plan=plan,
        optimizer=optax.adam(LEARNING_RATE),
        key=derive_key(key, "training"),
        progress=False,
    )
    return layout, result.params, result.report()


def draw(layout: Layout, params: PyTree, rows: int, key: PRNGKeyArray) -> np.ndarray:
    """Draws `(rows, columns)` cells; missing values are -1."""
    latent_key, cell_key, missing_key = jax.random.split(key, 3)

    @jax.jit
    def decode(latents: Array) -> tuple[Array, Array]:
        hidden = jnp.tanh(_apply(params["decoder"], latents))
        shares = jax.vmap(layout.log_shares)(_apply(params["cells"], hidden))
        values = jax.random.categorical(cell_key, shares, axis=-1)
        missing = jax.random.bernoulli(
            missing_key, jax.nn.sigmoid(_apply(params["missing"], hidden))
        )
        return values, missing & layout.may_miss

    values, missing = decode(jax.random.normal(latent_key, (rows, LATENT)))
    return np.where(np.asarray(missing), -1, np.asarray(values))
