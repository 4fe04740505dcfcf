"""Over many correct runs, the 95 % bound exceeds epsilon no more often than it may."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import dpoptax
from dpoptax.audit import Audit, GradientCanaries
from dpoptax.audit._many_runs import one_run
from dpoptax.training import DeviceData

CANARIES, ROWS, RUNS = 600, 20, 200
PLAN = dpoptax.Plan(
    sampler=dpoptax.samplers.Poisson(CANARIES + ROWS, 310), clip=1.0, noise_multiplier=1.2,
    num_steps=3, delta=1e-3,
)  # fmt: skip


def loss(w, x):
    return jnp.sum((w - x) ** 2)


def audits():
    """Audits of runs with gradients of real examples in the coordinates of the canaries."""
    params, data = jnp.zeros(650), DeviceData(jnp.ones((ROWS, 650)))
    canaries = GradientCanaries(CANARIES).start(loss, params, data, PLAN, jax.random.key(0))
    one = one_run(loss, params, PLAN, optax.sgd(0.1), canaries)
    coins = jax.random.bernoulli(jax.random.key(1), shape=(RUNS, CANARIES))
    keys = jax.random.split(jax.random.key(2), RUNS)
    run = jax.jit(lambda runs: jax.lax.map(one, runs, batch_size=20))
    for scores, is_in in zip(*map(np.asarray, (run((keys, coins)), coins)), strict=True):
        yield Audit.from_scores(scores[is_in], scores[~is_in], plan=PLAN, independent=True)


@pytest.mark.nightly
def test_the_bound_exceeds_epsilon_no_more_often_than_it_may():
    epsilon = PLAN.epsilon()
    bounds = np.array([audit.lower_bound().epsilon for audit in audits()])
    assert np.sum(bounds > epsilon) <= scipy.stats.binom(RUNS, 0.05).ppf(0.999)
    # Not because the bounds are empty. The same scores refute a plan with more noise.
    assert np.median(bounds) > 0.4 * epsilon
    assert np.mean(bounds > PLAN.replace(noise_multiplier=3.0).epsilon()) > 0.5
