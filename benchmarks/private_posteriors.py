"""Coverage and width of 90 % intervals of a linear regression, by three private posteriors.

    python -m benchmarks.private_posteriors

Worlds are drawn from the prior: five features, uniform in [-1, 1], 2,000 examples, and a standard
deviation of the noise of 0.5. Variational inference and SGLD know that standard deviation; the
posterior from sufficient statistics infers it. Prints the table of docs/private_posteriors.md, with
standard errors over worlds.
"""

import argparse
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dpoptax
from dpoptax.vi import aligned_elbo, guides
from dpoptax.vi.conjugate import LinearRegression, _regression_posterior
from dpoptax.vi.sgmcmc import SGLD

NUM_EXAMPLES, DIM, SIGMA, DELTA = 2000, 5, 0.5, 1e-5
CLIP, NUM_STEPS = 8.0, 300
MODEL = LinearRegression(
    num_features=DIM, x_bound=math.sqrt(DIM), y_bound=4.0, coefficient_scale=1.0
)


def world(key):
    keys = jax.random.split(key, 3)
    truth = SIGMA * jax.random.normal(keys[0], (DIM,))
    x = jax.random.uniform(keys[1], (NUM_EXAMPLES, DIM), minval=-1.0)
    return truth, x, x @ truth + SIGMA * jax.random.normal(keys[2], (NUM_EXAMPLES,))


def log_likelihood(latents, example):
    x, y = example
    return -((y - jnp.sum(x * latents)) ** 2) / (2 * SIGMA**2)


def without_privacy(key, x, y, epsilon):
    del epsilon
    precision = (x.T @ x + jnp.eye(DIM)) / SIGMA**2
    mean = jnp.linalg.solve(precision, x.T @ y / SIGMA**2)
    white = jax.random.normal(key, (1000, DIM))
    return mean + jnp.linalg.solve(jnp.linalg.cholesky(precision).T, white.T).T


def plan_of(epsilon, batch, num_steps):
    return dpoptax.Plan.calibrate(
        num_examples=NUM_EXAMPLES,
        expected_batch_size=batch,
        clip=CLIP,
        num_steps=num_steps,
        epsilon=epsilon,
        delta=DELTA,
    )


def sufficient_statistics(key, x, y, epsilon):
    release_key, draw_key = jax.random.split(key)
    noise = plan_of(epsilon, NUM_EXAMPLES, 1).noise_multiplier
    values, stddev = MODEL._noisy_sum(release_key, (x, y), noise)
    (coefficients, _), _ = _regression_posterior.draw(
        values, stddev, draw_key, MODEL._prior(), NUM_EXAMPLES, 1000
    )
    return coefficients * (MODEL.y_bound / MODEL.x_bound)


def train(loss, params, data, plan, optimizer, keys):
    """Returns the parameters after each step, in one program for all worlds."""
    tx = dpoptax.transforms.chain(plan.privatize(keys[0]), optimizer)
    if hasattr(loss, "wrap"):
        tx = optax.chain(loss.wrap(plan.privatize(keys[0]), keys[3]), optimizer)
    run = {"tx": tx, "sampler": plan.sampler}
    step = dpoptax.training.make_train_step(loss, **run)
    state = dpoptax.training.init_state(params, sampling_key=keys[1], model_key=keys[2], **run)

    def one(state, _):
        state, _ = step(state, data)
        return state, state.params

    return jax.lax.scan(one, state, None, length=plan.num_steps)[1]


def variational(key, x, y, epsilon):
    plan = plan_of(epsilon, 400, NUM_STEPS)
    guide = guides.MeanField(jnp.zeros(DIM))
    elbo = aligned_elbo(guide, log_likelihood, prior=SIGMA, num_examples=NUM_EXAMPLES)
    keys = jax.random.split(key, 5)
    params = guide.init(keys[4], keys[4])["params"]
    trace = train(elbo, params, (x, y), plan, optax.adam(0.05), keys)
    averaged = jax.tree.map(lambda leaf: leaf[NUM_STEPS // 2 :].mean(axis=0), trace)
    draw = lambda key: guide.apply({"params": averaged}, key)  # noqa: E731
    return jax.vmap(draw)(jax.random.split(keys[4], 1000))


def langevin(key, x, y, epsilon):
    plan = plan_of(epsilon, NUM_EXAMPLES, NUM_STEPS)
    noise = NUM_EXAMPLES * plan.noise_multiplier * CLIP / NUM_EXAMPLES
    # Steps that privacy does not heat up, within limits: the chain must forget where it starts, and
    # be stable. The curvature of the log posterior follows from the distribution of the features.
    curvature = NUM_EXAMPLES / 3 / SIGMA**2
    step_size = min(max(2 / noise**2, 0.08 / curvature), 0.3 / curvature)
    keys = jax.random.split(key, 4)
    optimizer = SGLD(step_size).optimizer(plan, SIGMA, key=keys[3])
    loss = lambda latents, example: -log_likelihood(latents, example)  # noqa: E731
    return train(loss, jnp.zeros(DIM), (x, y), plan, optimizer, keys)[NUM_STEPS // 3 :]


METHODS = {
    "without privacy": without_privacy,
    "sufficient statistics": sufficient_statistics,
    "aligned variational inference": variational,
    "SGLD": langevin,
}


def measure(method, epsilon, keys):
    """Returns coverage, its standard error over worlds, and the mean width."""

    def one(key):
        world_key, method_key = jax.random.split(key)
        truth, x, y = world(world_key)
        low, high = jnp.quantile(method(method_key, x, y, epsilon), jnp.array([0.05, 0.95]), axis=0)
        return (low < truth) & (truth < high), high - low

    covered, widths = jax.vmap(one)(keys)
    by_world = np.asarray(covered, np.float64).mean(axis=1)
    error = by_world.std(ddof=1) / math.sqrt(len(keys))
    return by_world.mean(), error, float(widths.mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", type=int, default=40)
    parser.add_argument("--epsilon", type=float, nargs="+", default=[1.0, 4.0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    arguments = parser.parse_args()
    keys = jax.random.split(jax.random.key(0), arguments.worlds)
    print("| posterior | epsilon | coverage | width |\n|---|---|---|---|")
    for name in arguments.methods:
        for epsilon in arguments.epsilon if name != "without privacy" else [math.inf]:
            coverage, error, width = measure(METHODS[name], epsilon, keys)
            level = "-" if math.isinf(epsilon) else f"{epsilon:g}"
            print(f"| {name} | {level} | {coverage:.2f} ± {error:.2f} | {width:.3f} |", flush=True)


if __name__ == "__main__":
    main()
