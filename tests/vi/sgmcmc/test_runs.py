"""Chains as private runs: every gradient is charged once, with noise of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpoptax
from dpoptax.vi.sgmcmc import SGLD, GradEstimator, sample

blackjax = pytest.importorskip("blackjax")

DATA = jax.random.normal(jax.random.key(0), (60,))
PLAN = dpoptax.Plan(
    sampler=dpoptax.samplers.Poisson(60, 30),
    clip=5.0,
    noise_multiplier=1.0,
    num_steps=8,
    delta=1e-3,
)


def log_likelihood(mean, x):
    return -0.5 * (x - mean) ** 2


def estimator(**changes):
    return GradEstimator(
        log_likelihood, 3.0, jnp.array(0.0), DATA, plan=PLAN.replace(**changes), key=None
    )


@pytest.mark.seconds
def test_a_chain_charges_every_step_of_its_plan():
    chain = sample(
        *(log_likelihood, 3.0, jnp.array(0.0), DATA),
        plan=PLAN,
        kernel=SGLD(0.001),
        num_warmup=2,
        thin=3,
        key=jax.random.key(1),
    )
    assert chain.positions.shape == (2,)
    assert chain.ledger.num_steps == PLAN.num_steps
    assert chain.ledger.epsilon() == PLAN.epsilon()
    assert f"({PLAN.epsilon():.2f}" in str(chain.report)
    with pytest.raises(ValueError, match="gives no draw"):
        sample(
            *(log_likelihood, 3.0, jnp.array(0.0), DATA),
            plan=PLAN,
            kernel=SGLD(0.001),
            num_warmup=9,
        )


@pytest.mark.seconds
def test_a_loop_of_blackjax_is_charged_per_call():
    found = estimator()
    sgld = blackjax.sgld(found)
    position = sgld.init(jnp.array(0.0))
    for step in range(PLAN.num_steps):
        assert found.ledger.num_steps == step
        position = sgld.step(jax.random.key(step), position, None, 1e-3, 1.0)
    assert found.ledger.epsilon() == PLAN.epsilon()
    with pytest.raises(ValueError, match="at most 0 more steps"):
        sgld.step(jax.random.key(0), position, None, 1e-3, 1.0)


@pytest.mark.seconds
def test_calls_at_one_position_have_different_noise():
    found = estimator()
    values = {float(found(jnp.array(0.5), "one batch")) for _ in range(4)}
    assert len(values) == 4
    assert found.ledger.num_steps == 4


@pytest.mark.seconds
def test_the_gradient_is_that_of_the_log_posterior():
    full = dpoptax.samplers.Poisson(60, 60)
    found = estimator(sampler=full, noise_multiplier=1e-5)
    gradient = found(jnp.array(0.7), None)
    exact = jnp.sum(DATA - 0.7) - 0.7 / 9
    np.testing.assert_allclose(gradient, exact, rtol=1e-4)
    assert found.noise_stddev == pytest.approx(5e-5)


def test_a_compiled_call_is_refused():
    found = estimator()
    with pytest.raises(ValueError, match="traced position"):
        jax.jit(lambda position: found(position, None))(jnp.array(0.0))
    sghmc = blackjax.sghmc(found, num_integration_steps=3)
    with pytest.raises(ValueError, match="traced position"):
        sghmc.step(jax.random.key(0), jnp.array(0.0), None, 1e-3)
    assert found.ledger.num_steps == 0


def released(position, likelihood=log_likelihood, data=DATA):
    """The first private gradient of a new estimator, always with the same key."""
    made = GradEstimator(
        likelihood, 1e6, jnp.array(0.0), data, plan=FULL_BATCH, key=jax.random.key(7)
    )
    return float(made(jnp.array(position)))


FULL_BATCH = PLAN.replace(sampler=dpoptax.samplers.Poisson(60, 60), clip=50.0)


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"position": 0.7}, -36.0),
        (
            {"position": 0.1, "likelihood": lambda mean, x: -0.25 * (x - mean) ** 2},
            float(-0.5 * jnp.sum(DATA - 0.1)),
        ),
        ({"position": 0.1, "data": DATA.at[0].add(1.0)}, 1.0),
    ],
    ids=["position", "likelihood", "data"],
)
def test_one_key_for_two_estimators_does_not_share_noise(other, difference):
    assert released(0.1) == released(0.1)
    # The noise of 50 would cancel; nothing is clipped, so the difference would be exact.
    assert abs(released(**other) - released(0.1) - difference) > 0.1


def test_a_position_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="position must have the shapes"):
        estimator()(jnp.zeros(2))
