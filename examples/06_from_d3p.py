"""A d3p script with changed imports: Bayesian logistic regression by DP-SVI.

d3p (arXiv:2103.11648) runs NumPyro models privately, on old versions of JAX. This program is
written like its scripts. Apart from the imports there are two changes: the key comes from the
operating system, and epsilon follows from the sampler that draws the batches.

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
from dpoptax.compat.d3p import poisson_batchify_data  # was: from d3p.minibatch import ...
from dpoptax.random import secure_key  # was: from d3p.random import PRNGKey
from dpoptax.vi.numpyro import DPSVI  # was: from d3p.svi import DPSVI

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
    sampler = dpoptax.samplers.Poisson(num_examples, Q * num_examples)
    init_batches, get_batch = poisson_batchify_data(train, Q)
    svi_key, batch_key = jax.random.split(secure_key())
    num_batches, batch_state = init_batches(batch_key)
    num_steps = EPOCHS * num_batches
    dp_scale, epsilon = dpoptax.accounting.calibrate_noise_multiplier(
        epsilon=EPSILON, delta=DELTA, sampler=sampler, num_steps=num_steps
    )

    guide = AutoDiagonalNormal(model)
    svi = DPSVI(
        model,
        guide,
        numpyro.optim.Adam(0.05),
        Trace_ELBO(),
        clipping_threshold=CLIP,
        dp_scale=dp_scale,
        num_obs_total=num_examples,
        expected_batch_size=Q * num_examples,
    )
    svi_state = svi.init(svi_key, *train)

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
    epsilon = dpoptax.reports.round_up(epsilon)
    print(f"test accuracy {100 * accuracy:.1f} %, epsilon {epsilon} at delta {DELTA:g}")


if __name__ == "__main__":
    main()
