"""Kernels of SG-MCMC: the distribution that they sample, against closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpoptax
from dpoptax.vi.sgmcmc import SGHMC, SGLD, SGNHT

pytest.importorskip("blackjax")

# The mean of a normal distribution, in three dimensions, that no gradient exceeds the clip in.
NUM_EXAMPLES, CLIP, PRIOR_SCALE = 25, 6.0, 2.0
DATA = jax.random.normal(jax.random.key(0), (NUM_EXAMPLES, 3))
PRECISION = NUM_EXAMPLES + 1 / PRIOR_SCALE**2
MEAN = np.asarray(DATA.sum(axis=0) / PRECISION)
CHAINS, NUM_STEPS = 40, 600
STRATEGY = dpoptax.mechanisms.strategies.BandedToeplitz.square_root(4, num_steps=NUM_STEPS)


def plan_with(noise_stddev):
    """A plan whose gradient of the log posterior has this noise, by full batches."""
    return dpoptax.Plan(
        sampler=dpoptax.samplers.Poisson(NUM_EXAMPLES, NUM_EXAMPLES),
        clip=CLIP,
        noise_multiplier=noise_stddev / CLIP,
        num_steps=NUM_STEPS,
        delta=1e-3,
    )


def chains(kernel, plan, half=False):
    """Runs many chains, and returns positions after a warm-up: (chains, steps, 3)."""

    def one(key):
        keys = jax.random.split(key, 3)
        tx = dpoptax.transforms.chain(
            plan.privatize(keys[0]), kernel.optimizer(plan, PRIOR_SCALE, key=keys[1])
        )
        position = jnp.asarray(MEAN)

        def step(carry, _):
            position, state = carry
            updates, state = tx.update(position - DATA, state, position)
            position = optax.apply_updates(position, updates)
            return (position, state), position

        return jax.lax.scan(step, (position, tx.init(position)), None, length=NUM_STEPS)[1]

    found = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), CHAINS))
    return np.asarray(found, np.float64)[:, NUM_STEPS // 4 :]


def moments(positions):
    """Mean and variance with their standard errors over chains and coordinates."""
    off = positions - MEAN
    means = off.mean(axis=1).ravel()
    variances = (off**2).mean(axis=1).ravel()
    root = math.sqrt(len(means))
    return (
        (means.mean(), means.std(ddof=1) / root),
        (variances.mean(), variances.std(ddof=1) / root),
    )


def check(positions, variance, other=None):
    (mean, mean_error), (found, error) = moments(positions)
    assert abs(mean) < 4 * mean_error
    print(f"variance {found:.5f} ± {error:.5f}; expected {variance:.5f}")
    assert abs(found - variance) < 4 * error
    if other is not None:  # power: what another kernel would give is far off
        assert abs(found - other) > 6 * error


@pytest.mark.seconds
@pytest.mark.parametrize("noise", [0.5, 12.0, 20.0], ids=["little", "just enough", "too much"])
def test_sgld_samples_the_posterior_at_its_temperature(noise):
    kernel, plan = SGLD(0.012), plan_with(noise)
    step, private = kernel.step_size, kernel.step_size**2 * noise**2
    # A linear recursion: the variance of the noise of a step over what the step takes away.
    taken = 2 * step * PRECISION - (step * PRECISION) ** 2
    expected = max(2 * step, private) / taken
    assert kernel.temperature(plan) == pytest.approx(max(1.0, private / (2 * step)), rel=1e-6)
    posterior = 1 / PRECISION / (1 - step * PRECISION / 2)
    assert expected == pytest.approx(posterior * kernel.temperature(plan), rel=1e-6)
    # A kernel that injects all of its noise, as BlackJAX does without a temperature.
    untempered = (2 * step + private) / taken if noise > 1 else None
    check(chains(kernel, plan), expected, untempered)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [SGHMC(0.03, 2.0), SGNHT(0.03, 2.0)], ids=["sghmc", "sgnht"])
def test_friction_takes_up_the_noise_of_privacy(kernel):
    """The posterior at temperature 1, up to the error of the steps, which is small here."""
    plan = plan_with(20.0)
    found = chains(kernel, plan)
    (mean, mean_error), (variance, error) = moments(found)
    assert abs(mean) < 4 * mean_error
    print(f"variance {variance:.5f} ± {error:.5f}; posterior {1 / PRECISION:.5f}")
    assert abs(variance * PRECISION - 1) < 4 * error * PRECISION + 0.06
    # Without that friction the temperature would be 1 + step_size s² / (2 alpha) = 4.


def test_too_much_noise_for_the_step_is_refused():
    with pytest.raises(ValueError, match="step_size below"):
        SGHMC(0.1).optimizer(plan_with(200.0), 1.0, key=jax.random.key(0))


@pytest.mark.parametrize(
    "changes",
    [
        {"clip": dpoptax.clipping.QuantileClip(1.0)},
        {
            "mechanism": dpoptax.mechanisms.Correlated(STRATEGY),
            "sampler": dpoptax.samplers.CyclicPoisson(NUM_EXAMPLES, 2.5, 4),
        },
    ],
    ids=["clip with state", "correlated noise"],
)
def test_noise_that_is_not_known_or_not_independent_is_refused(changes):
    plan = plan_with(5.0).replace(**changes)
    for kernel in (SGLD(0.1), SGHMC(0.1), SGNHT(0.1)):
        with pytest.raises(ValueError, match="independent"):
            kernel.optimizer(plan, 1.0, key=jax.random.key(0))
