"""Variational inference: a guide, the aligned ELBO, and draws from the posterior."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

import dpoptax
from dpoptax.vi import aligned_elbo, guides

x = jax.random.normal(jax.random.key(0), (200, 3))
y = x @ jnp.arange(3.0)


def log_likelihood(
    latents: dict[str, jax.Array], example: tuple[jax.Array, jax.Array]
) -> jax.Array:
    inputs, output = example
    return -0.5 * (output - inputs @ latents["slope"]) ** 2


plan = dpoptax.Plan(
    sampler=dpoptax.samplers.Poisson(200, 50),
    clip=2.0,
    noise_multiplier=1.0,
    num_steps=5,
    delta=1e-4,
    mechanism=dpoptax.mechanisms.Gaussian(num_draws=2),
)
guide = guides.MeanField({"slope": jnp.zeros(3)})
elbo = aligned_elbo(guide, log_likelihood, prior=1.0, num_examples=200)
guide_params = cast(Any, guide.init(jax.random.key(0), jax.random.key(0)))["params"]
result = dpoptax.training.fit(
    elbo, guide_params, (x, y), plan=plan, optimizer=optax.adam(0.01), key=jax.random.key(1)
)
draw = guide.apply({"params": result.params}, jax.random.key(2))
print(draw, result.report().epsilon)
