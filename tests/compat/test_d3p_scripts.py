"""Scripts of d3p run with other imports: short ones with the calls of its four examples, and those.

The examples themselves run if DPOPTAX_D3P_DIR names a checkout of d3p, which has a folder
`examples`; its package on PyPI has none. `vae.py` also needs its data in `examples/.data`.
"""

import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import lax, random
from jax.example_libraries import stax

numpyro = pytest.importorskip("numpyro")

import numpyro.distributions as dist  # noqa: E402
from numpyro import param, plate, sample  # noqa: E402
from numpyro.handlers import scale  # noqa: E402
from numpyro.infer import Trace_ELBO as ELBO  # noqa: E402
from numpyro.optim import Adam  # noqa: E402

from dpoptax.compat import d3p  # noqa: E402
from dpoptax.compat.d3p.dputil import (  # noqa: E402
    approximate_sigma,
    approximate_sigma_remove_relation,
)
from dpoptax.compat.d3p.gmm import GaussianMixture  # noqa: E402
from dpoptax.compat.d3p.minibatch import (  # noqa: E402
    poisson_batchify_data,
    split_batchify_data,
    subsample_batchify_data,
)
from dpoptax.compat.d3p.modelling import (  # noqa: E402
    sample_multi_posterior_predictive,
    sample_prior_predictive,
)
from dpoptax.compat.d3p.svi import DPSVI  # noqa: E402
from dpoptax.compat.d3p.util import is_int_scalar  # noqa: E402

N, B, D = 400, 40, 2
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("d3p")]


@pytest.fixture(autouse=True)
def _standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # NumPyro mixes integers and floats
        yield


def train(svi, state, init, fetch, keys, change=lambda batch: batch):
    """The loops of the examples: `lax.fori_loop` over the batches of an epoch, in `jax.jit`."""

    @jax.jit
    def epoch(state, batches, num_batches):
        def body(i, carry):
            state, loss = carry
            state, batch_loss = svi.update(state, *change(fetch(i, batches)))
            return state, loss + batch_loss / (N * num_batches)

        return lax.fori_loop(0, num_batches, body, (state, 0.0))

    for key in keys:
        num_batches, batches = init(rng_key=key)
        state, loss = epoch(state, batches, num_batches)
    return state, loss


def mean_loss(svi, state, init, fetch, key, change=lambda batch: batch):
    @jax.jit
    def evaluate(state, batches, num_batches):
        def body(i, loss):
            return loss + svi.evaluate(state, *change(fetch(i, batches))) / (N * num_batches)

        return lax.fori_loop(0, num_batches, body, 0.0)

    num_batches, batches = init(rng_key=key)
    return evaluate(state, batches, num_batches)


def logistic(x, y=None, num_obs_total=None):
    batch_size, d = jnp.shape(x)
    total = batch_size if num_obs_total is None else num_obs_total
    w = sample("w", dist.Normal(jnp.zeros((d,)), jnp.ones((d,))))
    with plate("batch", total, batch_size):
        return sample("obs", dist.Bernoulli(logits=x.dot(w)), obs=y)


def logistic_guide(x, y=None, num_obs_total=None):
    d = jnp.shape(x)[1]
    std = jnp.exp(param("w_std_log", jnp.zeros((d,))))
    sample("w", dist.Normal(param("w_loc", jnp.zeros((d,))), std))


def logistic_data():
    x = random.normal(random.PRNGKey(1), (2 * N, D))
    y = sample_prior_predictive(random.PRNGKey(2), logistic, (x,), {"w": jnp.array([3.0, -2.0])})
    return (x[:N], y["obs"][:N]), (x[N:], y["obs"][N:])


def test_logistic_regression():
    data, held_out = logistic_data()
    init, fetch = subsample_batchify_data(data, batch_size=B)
    test_init, test_fetch = split_batchify_data(held_out, batch_size=B)
    svi = DPSVI(logistic, logistic_guide, Adam(0.1), ELBO(),
                dp_scale=0.01, clipping_threshold=20.0, num_obs_total=N)  # fmt: skip
    rng, init_key, fetch_key = d3p.random.split(d3p.random.PRNGKey(0), 3)
    state = svi.init(init_key, *fetch(0, init(rng_key=fetch_key)[1]))
    first = mean_loss(svi, state, test_init, test_fetch, rng)
    state, _ = train(svi, state, init, fetch, d3p.random.split(rng, 8))
    assert mean_loss(svi, state, test_init, test_fetch, rng) < 0.8 * first
    key = d3p.random.convert_to_jax_rng_key(rng)
    x, y = held_out
    draws = sample_multi_posterior_predictive(
        key, 20, logistic, (x,), logistic_guide, (x,), svi.get_params(state)
    )
    assert jnp.average(draws["obs"] == y) > 0.7


def test_logistic_regression_with_poisson_batches():
    """The calls of the development version: padded batches, and noise for them."""
    data, _ = logistic_data()
    init, fetch = poisson_batchify_data(data, B / N, max_batch_size=0.99, rng_suite=d3p.random)
    sigma, epsilon, _ = approximate_sigma_remove_relation(2.0, 1e-3, B / N, 80)
    svi = DPSVI(logistic, logistic_guide, Adam(0.1), ELBO(), rng_suite=d3p.random,
                dp_scale=sigma, clipping_threshold=2.0, num_obs_total=N)  # fmt: skip
    rng, init_key, fetch_key = d3p.random.split(d3p.random.PRNGKey(0), 3)
    batch, _ = fetch(0, init(fetch_key)[1])
    state = svi.init(init_key, *batch)

    @jax.jit
    def epoch(state, batches, num_batches):
        def body(i, state):
            batch, mask = fetch(i, batches)
            return svi.update(state, *batch, mask=mask)[0]

        return lax.fori_loop(0, num_batches, body, state)

    for key in d3p.random.split(rng, 8):
        num_batches, batches = init(key)
        state = epoch(state, batches, num_batches)
    w = svi.get_params(state)["w_loc"]
    assert w[0] > 0.5
    assert w[1] < -0.3
    spent = svi.get_epsilon(1e-3, B / N, num_epochs=8)
    assert 0.98 * epsilon < spent <= 1.0001 * epsilon


def gaussian(obs=None, num_obs_total=None, d=None):
    batch_size, d = (num_obs_total, d) if obs is None else jnp.shape(obs)
    mu = sample("mu", dist.Normal(jnp.zeros((d,)), 1.0))
    with plate("batch", num_obs_total, batch_size):
        x = dist.Normal(mu, 0.1).to_event(1)
        return sample("obs", x, obs=obs, sample_shape=(batch_size,))


def gaussian_guide(obs=None, num_obs_total=None, d=None):
    std = jnp.exp(param("mu_std_log", jnp.zeros(d)))
    sample("mu", dist.Normal(param("mu_loc", jnp.zeros(d)), std))


def test_simple_gaussian_posterior():
    rng, data_key = random.split(random.PRNGKey(1234), 2)
    draws = sample_prior_predictive(data_key, gaussian, (None, N, D), {"mu": jnp.ones(D)})
    init, fetch = subsample_batchify_data((draws["obs"],), batch_size=B)
    svi = DPSVI(gaussian, gaussian_guide, Adam(0.05), ELBO(),
                dp_scale=1.0, clipping_threshold=1.0, d=D, num_obs_total=N)  # fmt: skip
    rng, init_key, fetch_key = random.split(rng, 3)
    state = svi.init(init_key, *fetch(0, init(rng_key=fetch_key)[1]))
    epsilon = svi.get_epsilon(1e-3, B / N, num_epochs=10)
    state, _ = train(svi, state, init, fetch, random.split(rng, 10))
    assert svi.get_epsilon(1e-3, B / N, num_iter=100) == epsilon
    assert jnp.abs(svi.get_params(state)["mu_loc"] - 1).max() < 0.2


def mixture(k, obs=None, num_obs_total=None, d=None):
    batch_size, d = (num_obs_total, d) if obs is None else jnp.shape(obs)
    pis = sample("pis", dist.Dirichlet(jnp.ones(k)))
    mus = sample("mus", dist.Normal(jnp.zeros((k, d)), 10.0))
    sigs = sample("sigs", dist.InverseGamma(1.0, 1.0), sample_shape=jnp.shape(mus))
    with plate("batch", num_obs_total, batch_size):
        x = GaussianMixture(mus, sigs, pis)
        return sample("obs", x, obs=obs, sample_shape=(batch_size,))


def mixture_guide(k, obs=None, num_obs_total=None, d=None):
    d = jnp.shape(obs)[1]
    sample("pis", dist.Dirichlet(jnp.exp(param("alpha_log", jnp.zeros(k)))))
    mus = sample("mus", dist.Normal(param("mus_loc", jnp.zeros((k, d))), 1.0))
    sample("sigs", dist.InverseGamma(1.0, 1.0), obs=jnp.ones_like(mus))


def test_gaussian_mixture_model():
    known = {
        "pis": jnp.array([0.5, 0.5]),
        "mus": jnp.array([[-5.0] * D, [5.0] * D]),
        "sigs": jnp.array([[0.1], [1.0]]),
    }
    draws = sample_prior_predictive(
        random.PRNGKey(0), mixture, (2, None, N, D), substitutes=known, with_intermediates=True
    )
    x, z = draws["obs"][0], draws["obs"][1][0]
    assert ((x[:, 0] > 0) == (z == 1)).all()

    def fixed(program):
        return lambda obs, **kwargs: program(2, obs, **kwargs)

    init, fetch = subsample_batchify_data((x,), batch_size=B)
    svi = DPSVI(fixed(mixture), fixed(mixture_guide), Adam(0.2), ELBO(),
                dp_scale=0.01, clipping_threshold=20.0, num_obs_total=N)  # fmt: skip
    rng, init_key, fetch_key = random.split(random.PRNGKey(5), 3)
    state = svi.init(init_key, *fetch(0, init(fetch_key)[1]))
    state, _ = train(svi, state, init, fetch, random.split(rng, 20))
    modes = svi.get_params(state)["mus_loc"]
    assert jnp.abs(jnp.sort(modes, axis=0) - known["mus"]).max() < 1.5


def decoder(out_dim):
    return stax.serial(stax.Dense(8, W_init=stax.randn()), stax.Softplus,
                       stax.Dense(out_dim, W_init=stax.randn()), stax.Sigmoid)  # fmt: skip


def encoder(z_dim):
    return stax.serial(
        stax.Dense(8, W_init=stax.randn()), stax.Softplus, stax.FanOut(2),
        stax.parallel(stax.Dense(z_dim, W_init=stax.randn()),
                      stax.serial(stax.Dense(z_dim, W_init=stax.randn()), stax.Exp)),
    )  # fmt: skip


def vae(batch_or_size, z_dim, out_dim=None, num_obs_total=None):
    batch, batch_size = None, batch_or_size
    if not is_int_scalar(batch_or_size):
        batch_size = jnp.shape(batch_or_size)[0]
        batch = jnp.reshape(batch_or_size, (batch_size, -1))
        out_dim = jnp.shape(batch)[1]
    total = batch_size if num_obs_total is None else num_obs_total
    decode = numpyro.module("decoder", decoder(out_dim), (batch_size, z_dim))
    with plate("batch", total, batch_size):
        z = sample("z", dist.Normal(jnp.zeros((z_dim,)), jnp.ones((z_dim,))).to_event(1))
        return sample("obs", dist.Bernoulli(decode(z)).to_event(1), obs=batch)


def vae_guide(batch, z_dim, out_dim=None, num_obs_total=None):
    batch_size = jnp.shape(batch)[0]
    batch = jnp.reshape(batch, (batch_size, -1))
    total = batch_size if num_obs_total is None else num_obs_total
    encode = numpyro.module("encoder", encoder(z_dim), (batch_size, jnp.shape(batch)[1]))
    with plate("batch", total, batch_size):
        sample("z", dist.Normal(*encode(batch)).to_event(1))


def test_vae():
    """The loss is scaled by 1 / N in this example, and the batches are changed before a step."""
    images = jnp.where(random.bernoulli(random.PRNGKey(3), 0.5, (N, 1, 1)), 0.9, 0.1)
    images = jnp.broadcast_to(images, (N, 4, 4))
    init, fetch = subsample_batchify_data((images, jnp.zeros(N)), B)
    test_init, test_fetch = split_batchify_data((images, jnp.zeros(N)), B)

    def binarize(batch):
        return (random.bernoulli(random.PRNGKey(4), batch[0]).astype(batch[0].dtype),)

    # So few images need much epsilon.
    sigma, epsilon, _ = approximate_sigma(200.0, 1 / N, q=B / N, num_iter=100, force_smaller=True)
    assert epsilon <= 200
    svi = DPSVI(scale(vae, scale=1 / N), scale(vae_guide, scale=1 / N), Adam(0.05), ELBO(),
                dp_scale=sigma, clipping_threshold=1.0, num_obs_total=N, z_dim=2)  # fmt: skip
    rng, init_key, fetch_key = random.split(random.PRNGKey(0), 3)
    batch = binarize(fetch(0, init(rng_key=fetch_key)[1]))
    state = svi.init(init_key, *batch)
    first = mean_loss(svi, state, test_init, test_fetch, rng, binarize)
    state, _ = train(svi, state, init, fetch, random.split(rng, 10), binarize)
    assert mean_loss(svi, state, test_init, test_fetch, rng, binarize) < 0.9 * first
    params = svi.get_params(state)
    draws = sample_multi_posterior_predictive(
        rng, 3, vae, (1, 2, 16), vae_guide, (images[:1], 2), params
    )
    assert draws["obs"].shape == (3, 1, 16)


FOLDER = os.environ.get("DPOPTAX_D3P_DIR")
EXAMPLES = {
    "logistic_regression": ["-n", "10", "-N", "2000"],
    "simple_gaussian_posterior": ["-n", "10", "-N", "2000"],
    "gaussian_mixture_model": ["-n", "2"],
    "vae": ["-n", "1"],
}


@pytest.mark.e2e
@pytest.mark.skipif(FOLDER is None, reason="DPOPTAX_D3P_DIR names no checkout of d3p")
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_of_d3p_runs_with_other_imports(name, tmp_path):
    for path in (pathlib.Path(FOLDER) / "examples").glob("*.py"):
        (tmp_path / path.name).write_text(with_other_imports(path.read_text()))
    data = pathlib.Path(FOLDER) / "examples" / ".data"
    if data.exists():
        (tmp_path / ".data").symlink_to(data)
    elif name == "vae":
        pytest.skip("examples/.data has no MNIST, which the example would download")
    done = subprocess.run(
        [sys.executable, f"{name}.py", *EXAMPLES[name]],
        cwd=tmp_path,
        env=os.environ | {"MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Epoch 0: loss = " in done.stdout


def with_other_imports(text):
    text = re.sub(r"^import d3p\.random$", "from dpoptax.compat import d3p", text, flags=re.M)
    text = re.sub(r"^from d3p\.", "from dpoptax.compat.d3p.", text, flags=re.M)
    return text.replace(
        "from jax.experimental import stax", "from jax.example_libraries import stax"
    )


def test_only_imports_are_changed():
    before = "import d3p.random\nfrom d3p.svi import DPSVI\nkey = d3p.random.PRNGKey(0)\n"
    after = "from dpoptax.compat import d3p\nfrom dpoptax.compat.d3p.svi import DPSVI\n"
    assert with_other_imports(before) == after + "key = d3p.random.PRNGKey(0)\n"
