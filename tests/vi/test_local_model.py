"""What calibrated posteriors take from simulated examples, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpoptax.vi._antithetic import balanced_normal
from dpoptax.vi._likelihood_of_releases import NoiseLevel, SlopePrior, likelihood_of_releases
from dpoptax.vi._local_model import Simulation, model_of_precision, simulated_model
from dpoptax.vi._releases import Releases

CENTRE, STDDEV = 0.3, 0.5


def counts():
    """A Poisson model with the log rate as its latent, and a clip bound that is never reached."""
    return Simulation(
        log_likelihood=lambda log_rate, count: count * log_rate - jnp.exp(log_rate),
        unravel=lambda flat: flat[0],
        simulate=lambda key, log_rate: jax.random.poisson(key, jnp.exp(log_rate)).astype(float),
        l2_clip=1e6,
        key=jax.random.key(0),
    )


@pytest.mark.seconds
def test_uncertain_latents_have_a_second_order_effect_on_the_gradient():
    number = 20_000
    centre = jnp.array([CENTRE])
    latents = CENTRE + STDDEV * balanced_normal(jax.random.key(1), number, 1)
    model = simulated_model(counts(), centre, latents)
    # E[exp(c) - count] with count ~ Poisson(exp(theta)) and theta ~ N(c, s^2).
    expected = np.exp(CENTRE) * (1 - np.exp(STDDEV**2 / 2))
    # The difference of the two gradients is exp(c) - exp(theta): a log-normal's variance.
    variance = np.exp(2 * CENTRE + STDDEV**2) * (np.exp(STDDEV**2) - 1)
    np.testing.assert_allclose(model.gradient, [expected], atol=4 * (variance / number) ** 0.5)
    assert abs(expected) > 10 * (variance / number) ** 0.5
    np.testing.assert_array_equal(model.bias, [0.0])


@pytest.mark.seconds
def test_at_the_centre_only_clipping_gives_a_gradient():
    centre = jnp.array([CENTRE])
    model = simulated_model(counts()._replace(l2_clip=0.5), centre, jnp.tile(centre, (2000, 1)))
    np.testing.assert_allclose(model.gradient, model.bias, atol=1e-6)
    assert abs(model.bias[0]) > 0.01


def test_balanced_normal_vectors_have_mean_zero_in_every_even_part():
    vectors = balanced_normal(jax.random.key(0), 100, 3)
    np.testing.assert_array_equal(vectors[:40].mean(0), np.zeros(3))


@pytest.mark.seconds
def test_a_short_run_does_not_overestimate_its_slope():
    """Gradient descent follows its own noise, so a regression finds the slope too steep."""
    num_worlds, num_steps, rate, noise, slope = 2000, 40, 0.2, 1.0, 0.5
    level = NoiseLevel(stddev=noise, batch=0.0, num_examples=10**9, l2_clip=1e6)

    def world(key):
        run_key, error_key = jax.random.split(key)

        def step(point, normal):
            gradient = slope * point + noise * normal
            return point - rate * gradient, (point, gradient)

        normals = jax.random.normal(run_key, (num_steps,))
        _, (points, gradients) = jax.lax.scan(step, jnp.zeros(()), normals)
        points, gradients = points[:, None, None], gradients[:, None, None]
        releases = Releases(jnp.array(num_steps), points, gradients)
        centre = points.mean((0, 1))
        precision = jnp.array([[slope * level.num_examples]])
        local = model_of_precision(precision, level.num_examples, centre, points)
        prior = SlopePrior(each=0.5, common=0.0)
        return likelihood_of_releases(releases, centre, local, level, prior, error_key).slope

    slopes = jax.jit(jax.vmap(world))(jax.random.split(jax.random.key(0), num_worlds))
    error = float(jnp.std(slopes)) / num_worlds**0.5
    assert abs(float(slopes.mean()) - 1) < 0.05 + 4 * error
