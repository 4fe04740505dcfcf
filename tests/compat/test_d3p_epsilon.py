"""Epsilon of `d3p` scripts that err: it is never below that of what ran."""

import copy
import pickle

import jax
import jax.numpy as jnp
import pytest

numpyro = pytest.importorskip("numpyro")

import numpyro.distributions as dist  # noqa: E402
from numpyro.infer import Trace_ELBO  # noqa: E402
from numpyro.infer.autoguide import AutoNormal  # noqa: E402

from dpoptax.compat import d3p  # noqa: E402
from dpoptax.compat.d3p._laws import law_of  # noqa: E402
from dpoptax.compat.d3p.svi import DPSVI  # noqa: E402
from dpoptax.samplers import FixedSize, Poisson  # noqa: E402

N, DELTA = 200, 1e-4
X = (jnp.linspace(-1.0, 1.0, N),)
KEY = jax.random.key(1)


@pytest.fixture(autouse=True)
def _standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # NumPyro mixes integers and floats
        yield


def svi_of(dp_scale=1.0):
    def model(x):
        mean = numpyro.sample("mean", dist.Normal(0.0, 10.0))
        with numpyro.plate("data", N, len(x)):
            numpyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    optim = numpyro.optim.SGD(1e-3)
    return DPSVI(model, AutoNormal(model), optim, Trace_ELBO(), 1.0, dp_scale, num_obs_total=N)


def first_batch(function, q):
    init, get_batch = function(X, q=q)
    num_batches, state = init(KEY)
    batch = get_batch(0, state)
    return num_batches, batch[0] if isinstance(batch[0], d3p.minibatch.MaskedExamples) else batch


@pytest.mark.seconds
def test_epochs_have_as_many_updates_as_the_batchifier_says():
    q = 0.0074  # 1.48 examples: 200 batches in an epoch, where 1 / q is 135
    num_batches, batch = first_batch(d3p.poisson_batchify_data, q)
    svi = svi_of()
    svi.init(KEY, *batch)
    run = svi.get_epsilon(DELTA, q, num_iter=10 * num_batches)
    assert svi.get_epsilon(DELTA, q, num_epochs=10) == run


@pytest.mark.seconds
def test_a_sampler_that_contradicts_the_batches_is_refused():
    svi, (_, batch) = svi_of(), first_batch(d3p.subsample_batchify_data, 0.1)
    svi.update(svi.init(KEY, *batch), *batch)
    with pytest.raises(ValueError, match="but batches were drawn by FixedSize"):
        svi.get_epsilon(DELTA, 0.1, num_iter=10, sampler=Poisson(N, 20))
    svi = svi_of()
    svi.update(svi.init(KEY, X[0][:20]), X[0][:20])
    with pytest.raises(ValueError, match="one length and no mask"):
        svi.get_epsilon(DELTA, 0.1, num_iter=10, sampler=Poisson(N, 20))


@pytest.mark.seconds
def test_rows_that_are_repeated_or_cut_off_lose_their_sampler():
    _, batch = first_batch(d3p.poisson_batchify_data, 0.1)
    assert law_of(list(batch)) == batch.sampler
    twice = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), batch)
    fewer = jax.tree.map(lambda leaf: leaf[:20], batch)
    assert law_of(list(twice)) is law_of(list(fewer)) is None
    init, get_batch = d3p.subsample_batchify_data(X, 20)
    state = init(KEY)[1]
    assert law_of([get_batch(0, state), get_batch(1, state)]) is None


@pytest.mark.seconds
def test_run_tells_get_epsilon_its_sampler():
    svi, (_, batch) = svi_of(), first_batch(d3p.poisson_batchify_data, 0.1)
    svi.init(KEY, *batch)
    result = svi.run(KEY, 4, *X, sampler=FixedSize(N, 20), delta=DELTA, progress_bar=False)
    assert svi.get_epsilon(DELTA, 0.1, num_iter=4) == pytest.approx(result.fit.epsilon())
    sigma, _, _ = d3p.dputil.approximate_sigma_remove_relation(1.0, DELTA, 0.1, 4)
    with pytest.raises(ValueError, match="computed for batches of Poisson"):
        svi_of(sigma).run(KEY, 4, *X, sampler=FixedSize(N, 20), progress_bar=False)
    for copied in (copy.deepcopy(sigma), pickle.loads(pickle.dumps(sigma))):
        assert copied.sampler_class is Poisson
