"""A mixture of five normals in the plane: log-likelihood over epsilon.

2,000 points, 1,000 steps, clip 1, sampling rate 0.003, delta 1e-3, and the noise multipliers of the
paper (arXiv:2103.11648, section 5). Assignments are summed out, so no point has a latent variable.
The model is written in NumPyro, with an autoguide.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import Predictive, Trace_ELBO, autoguide

import dpoptax
from dpoptax.vi.numpyro import DPSVI
from reproduce.runs import Record, Run

NUM_EXAMPLES, COMPONENTS, STEPS, BATCH, DELTA = 2000, 5, 1000, 6, 1e-3
NOISE = (0.0, 0.27, 0.34, 0.48, 1.05, 2.0)
LEARNING_RATE = 0.03


def mixture(weights: jax.Array, centres: jax.Array, variances: jax.Array) -> dist.Distribution:
    """The law of one point."""
    parts = dist.Independent(dist.Normal(centres, jnp.sqrt(variances)[:, None]), 1)
    return dist.MixtureSameFamily(dist.Categorical(weights), parts)


def model(points: jax.Array) -> None:
    """Dirichlet(1), N(0, I) and InverseGamma(1, 1) priors."""
    weights = numpyro.sample("weights", dist.Dirichlet(jnp.ones(COMPONENTS)))
    centres = numpyro.sample("centres", dist.Normal(0, 1).expand([COMPONENTS, 2]).to_event(2))
    variances = numpyro.sample("variances", dist.InverseGamma(jnp.ones(COMPONENTS), 1).to_event(1))
    with numpyro.plate("data", NUM_EXAMPLES, subsample_size=len(points)):
        numpyro.sample("points", mixture(weights, centres, variances), obs=points)


def data(seed: int) -> np.ndarray:
    """Points around the origin and the four corners of a square, variance 0.5."""
    rng = np.random.default_rng(seed)
    centres = np.array([(0, 0), (2, 2), (2, -2), (-2, 2), (-2, -2)])
    noise = np.sqrt(0.5) * rng.normal(size=(NUM_EXAMPLES, 2))
    return (centres[rng.integers(5, size=NUM_EXAMPLES)] + noise).astype(np.float32)


def train(noise_multiplier: float, seed: int) -> Record:
    """Trains one model; returns the predictive log-likelihood of a new point."""
    guide = autoguide.AutoNormal(model)
    svi = DPSVI(
        model,
        guide,
        numpyro.optim.Adam(LEARNING_RATE),
        Trace_ELBO(),
        clipping_threshold=1.0,
        dp_scale=noise_multiplier,
        num_obs_total=NUM_EXAMPLES,
    )
    sampler = dpoptax.samplers.Poisson(NUM_EXAMPLES, BATCH)
    result = svi.run(
        jax.random.key(seed),
        STEPS,
        data(seed),
        sampler=sampler,
        delta=DELTA,
        progress_bar=False,
    )
    fresh = jnp.asarray(data(seed + 1000))
    draws = Predictive(guide, params=result.params, num_samples=100)(jax.random.key(0), fresh)
    densities = jax.vmap(lambda w, c, v: mixture(w, c, v).log_prob(fresh))(
        draws["weights"], draws["centres"], draws["variances"]
    )
    predictive = jax.nn.logsumexp(densities, axis=0) - jnp.log(100)
    epsilon = result.fit.epsilon() if noise_multiplier else None
    return {"epsilon": epsilon, "log_likelihood": float(predictive.mean())}


def truth(seed: int) -> Record:
    """The log-likelihood of a new point under the law that drew it."""
    fresh = jnp.asarray(data(seed + 1000))
    centres = jnp.array([(0, 0), (2, 2), (2, -2), (-2, 2), (-2, -2)], jnp.float32)
    law = mixture(jnp.full(5, 0.2), centres, jnp.full(5, 0.5))
    return {"log_likelihood": float(law.log_prob(fresh).mean())}


def runs(seeds: tuple[int, ...]) -> Iterator[Run]:
    """All runs of this part."""
    for seed in seeds:
        yield Run(f"mixture: truth, seed {seed}", 1, functools.partial(truth, seed))
        for noise in NOISE:
            name = f"mixture: noise {noise:g}, seed {seed}"
            yield Run(name, 12, functools.partial(train, noise, seed))
