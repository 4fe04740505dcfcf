"""A d3p script with changed imports: Bayesian logistic regression by DP-SVI.

d3p (arXiv:2103.11648) runs NumPyro models privately, on old versions of JAX. This program is
written like its scripts, and only the imports are other ones. docs/from_d3p.md lists what differs.

    python examples/06_from_d3p.py

It needs NumPyro and scikit-learn: pip install 'dpoptax[numpyro,examples]'.
"""

import example_data
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.infer import Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoDiagonalNormal

import dpoptax
from dpoptax.compat.d3p.dputil import approximate_sigma_remove_relation
from dpoptax.compat.d3p.minibatch import poisson_batchify_data
from dpoptax.compat.d3p.random import PRNGKey, split
from dpoptax.compat.d3p.svi import DPSVI

EPOCHS, Q, CLIP, EPSILON, DELTA = 60, 0.1, 1.0, 2.0, 1e-4


def model(x: jax.Array, y: jax.Array | None = None, num_obs_total: int = 455) -> None:
    weights = numpyro.sample("weights", dist.Normal(0, 1).expand(x.shape[-1:]).to_event(1))
    intercept = numpyro.sample("intercept", dist.Normal(0, 1))
    with numpyro.plate("data", num_obs_total, subsample_size=len(x)):
        numpyro.sample("y", dist.Bernoulli(logits=x @ weights + intercept), obs=y)


def main() -> None:
    data = example_data.breast_cancer()
    train = jnp.asarray(data.train_inputs), jnp.asarray(data.train_labels)
    num_examples = len(train[0])
    init_batches, get_batch = poisson_batchify_data(train, Q, max_batch_size=0.99)
    svi_key, batch_key = split(PRNGKey())
    num_batches, batch_state = init_batches(batch_key)
    num_steps = EPOCHS * num_batches
    dp_scale, _, _ = approximate_sigma_remove_relation(EPSILON, DELTA, Q, num_steps)

    guide = AutoDiagonalNormal(model)
    svi = DPSVI(
        model,
        guide,
        numpyro.optim.Adam(0.05),
        Trace_ELBO(),
        clipping_threshold=CLIP,
        dp_scale=dp_scale,
        num_obs_total=num_examples,
    )
    first_batch, _ = get_batch(0, batch_state)
    svi_state = svi.init(svi_key, *first_batch)

    @jax.jit
    def run_epoch(epoch, svi_state):
        def body(i, svi_state):
            batch, mask = get_batch(epoch * num_batches + i, batch_state)
            return svi.update(svi_state, *batch, mask=mask)[0]

        return jax.lax.fori_loop(0, num_batches, body, svi_state)

    for epoch in range(EPOCHS):
        svi_state = run_epoch(epoch, svi_state)

    draws = Predictive(guide, params=svi.get_params(svi_state), num_samples=200)(
        jax.random.key(0), *train
    )
    logits = data.test_inputs @ draws["weights"].mean(0) + draws["intercept"].mean()
    accuracy = jnp.mean((logits > 0) == data.test_labels)
    epsilon = dpoptax.reports.round_up(svi.get_epsilon(DELTA, Q, num_iter=num_steps))
    print(f"test accuracy {100 * accuracy:.1f} %, epsilon {epsilon} at delta {DELTA:g}")


if __name__ == "__main__":
    main()
