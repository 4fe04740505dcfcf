"""A row that packs several sequences is refused, because the plan protects a row."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpoptax
from dpoptax import Plan, samplers
from dpoptax.training import HostData, fit

ROWS, TOKENS = 12, 6
PADDED = np.tile(np.array([1, 1, 1, 1, 0, 0], np.int32), (ROWS, 1))
PACKED = PADDED.copy()
PACKED[7] = [1, 1, 2, 2, 3, 0]
MESSAGE = r"data\['segment_ids'\] must have one sequence in each row; .*UserPoisson"


def loss_fn(params, example):
    return jnp.sum(jnp.where(example["segment_ids"] > 0, (params - example["tokens"]) ** 2, 0))


def train(data, sampler=None):
    sampler = sampler or samplers.Poisson(ROWS, 4)
    plan = Plan(sampler=sampler, clip=1.0, noise_multiplier=1.0, num_steps=1, delta=1e-3)
    run = {"optimizer": optax.sgd(0.1), "key": jax.random.key(0), "progress": False}
    return fit(loss_fn, jnp.zeros(TOKENS), data, plan=plan, **run)


def rows_with(segments):
    return {"segment_ids": segments, "tokens": np.ones((ROWS, TOKENS), np.float32)}


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, lambda rows: np.asarray(rows, np.uint8)])
def test_one_packed_row_is_refused_without_its_values(kind):
    with pytest.raises(ValueError, match=MESSAGE) as caught:
        train(rows_with(kind(PACKED)))
    assert "7" not in str(caught.value)


def test_packed_rows_on_the_host_are_refused_by_the_first_one():
    with pytest.raises(ValueError, match=MESSAGE):
        train(HostData(rows_with(PACKED[::-1][4:].repeat(2, 0)[:ROWS])))
    with pytest.raises(ValueError, match=MESSAGE):
        dpoptax.training.PrivateRun(
            loss_fn,
            jnp.zeros(TOKENS),
            HostData([{"segment_ids": PACKED[7], "tokens": np.ones(TOKENS)}] * ROWS),
            plan=Plan(
                sampler=samplers.Poisson(ROWS, 4),
                clip=1.0, noise_multiplier=1.0, num_steps=1, delta=1e-3,
            ),
            optimizer=optax.sgd(0.1),
        )  # fmt: skip


@pytest.mark.seconds
def test_padding_sentence_pairs_and_rows_of_one_user_are_accepted():
    assert train(rows_with(PADDED)).num_steps == 1
    assert train(rows_with(PADDED - 1)).num_steps == 1  # -1 marks padding
    sampler = samplers.UserPoisson(np.arange(ROWS), 4, max_examples_per_user=1)
    assert train(sampler.arrange(rows_with(PACKED))[0], sampler).num_steps == 1
