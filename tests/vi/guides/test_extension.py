"""A new guide is one class: this file defines one, checks it and trains it privately."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from jax.flatten_util import ravel_pytree

import dpoptax
from dpoptax.vi import aligned_elbo, global_elbo
from dpoptax.vi.guides import Guide, Joint, MeanField
from dpoptax.vi.guides._base import NormalGuide, flat, normal_kl, standard_normal_log_prob

N = 400


class Isotropic(NormalGuide):
    """Independent normal latents with one scale for all."""

    def setup(self):
        self.location = self._location_param()
        self.raw_scale = self.param(
            "raw_scale", lambda _: jnp.log(jnp.expm1(jnp.float32(self.initial_scale)))
        )

    def noise(self, key):
        return jax.random.normal(key, (self._size(),))

    def transform(self, base_noise):
        loc, unravel = ravel_pytree(self.location.tree)
        return unravel(loc + nn.softplus(self.raw_scale) * base_noise)

    def log_prob(self, latents):
        scale = nn.softplus(self.raw_scale)
        standardized = (flat(latents) - flat(self.location.tree)) / scale
        return standard_normal_log_prob(standardized) - self._size() * jnp.log(scale)

    def kl(self, scale):
        own = nn.softplus(self.raw_scale)
        variances = jnp.full(self._size(), own**2)
        return normal_kl(flat(self.location.tree), variances, self._size() * jnp.log(own), scale)


def start(guide):
    return guide.init(jax.random.key(0), jax.random.key(0))["params"]


@pytest.mark.slow
def test_a_new_guide_has_the_density_of_its_draws():
    guide = Isotropic({"a": jnp.array([0.5, -1.0]), "b": jnp.array(2.0)}, initial_scale=0.7)
    guide_params = start(guide)
    reference = scipy.stats.multivariate_normal([0.5, -1.0, 2.0], 0.49 * np.eye(3))
    latents = guide.apply({"params": guide_params}, jax.random.key(1))
    log_prob = guide.apply({"params": guide_params}, latents, method="log_prob")
    assert abs(float(log_prob) - reference.logpdf(ravel_pytree(latents)[0])) < 1e-4
    # KL to N(0, I) in closed form.
    expected = 0.5 * (3 * 0.49 + 5.25 - 3 - 3 * math.log(0.49))
    assert abs(float(guide.apply({"params": guide_params}, 1.0, method="kl")) - expected) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("make", [global_elbo, aligned_elbo])
def test_a_new_guide_is_trained_privately(make):
    """The posterior of a mean after N observations has the scale N**-0.5."""
    data = jnp.array([1.0, -1.0]) + jax.random.normal(jax.random.key(0), (N, 2))
    guide = Isotropic(jnp.zeros(2))
    elbo = make(guide, lambda mean, x: -0.5 * jnp.sum((x - mean) ** 2), num_examples=N)
    plan = dpoptax.Plan(
        sampler=dpoptax.samplers.Poisson(N, 100), clip=3.0, noise_multiplier=0.5,
        num_steps=600, delta=1e-4,
    )  # fmt: skip
    with jax.numpy_dtype_promotion("standard"):  # for Optax's schedule
        result = dpoptax.training.fit(
            elbo, start(guide), data, plan=plan, key=dpoptax.random.insecure_key(0), progress=False,
            optimizer=optax.adam(optax.linear_schedule(0.05, 0.0, 600)),
        )  # fmt: skip
    assert np.abs(result.params["loc"] - data.mean(0)).max() < 0.15
    if make is aligned_elbo:  # the scale gets no noise of its own, so it converges
        scale = float(nn.softplus(result.params["raw_scale"]))
        assert abs(math.log(scale * math.sqrt(N))) < 0.5


def test_a_new_guide_works_in_a_joint_guide():
    guide = Joint({"new": Isotropic(jnp.zeros(2)), "old": MeanField(jnp.zeros(3))})
    latents = guide.apply({"params": start(guide)}, jax.random.key(1))
    assert jax.tree.map(jnp.shape, latents) == {"new": (2,), "old": (3,)}


def test_a_guide_without_all_methods_is_refused():
    class Incomplete(Guide):
        size: int = dataclasses.field(default=1)

        def noise(self, key):
            return jax.random.normal(key, (self.size,))

    with pytest.raises(TypeError, match=r"abstract methods.*kl.*log_prob.*transform"):
        Incomplete()
