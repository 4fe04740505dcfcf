"""d3p's DPSVI: steps as long as d3p's, an epsilon of what ran, and arguments that reach the model.

The numbers in D3P were computed by d3p 0.2.0 with JAX 0.4.13 and NumPyro 0.11, by the program of
`steps` with `dp_scale=0`. Masks are of its development version (8c978db), whose rule was added to
that release: gradients are multiplied by the mask, and their sum is divided by the count.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

numpyro = pytest.importorskip("numpyro")

import numpyro.distributions as dist  # noqa: E402
from numpyro.handlers import scale  # noqa: E402
from numpyro.infer import Trace_ELBO  # noqa: E402
from numpyro.infer.autoguide import AutoDelta  # noqa: E402

from dpoptax.accounting import epsilon  # noqa: E402
from dpoptax.compat import d3p  # noqa: E402
from dpoptax.compat.d3p.svi import DPSVI  # noqa: E402
from dpoptax.samplers import FixedSize, Poisson, Shuffled  # noqa: E402

N, B = 200, 50
ROWS = np.arange(N)
X = (2 * np.stack([np.sin(ROWS * k) for k in (1.0, 2.0, 3.0)], 1)).astype(np.float32)
Y = (np.cos(ROWS * 5.0) + X[:, 0] > 0).astype(np.int32)
DATA = jnp.asarray(X), jnp.asarray(Y)
D3P = {
    "plain": [0.072275, -9e-06, 0.024161],
    "handlers.scale": [0.072275, -9e-06, 0.024161],
    "Adam": [0.294699, 0.107304, 0.29089],
    "clip with scale": [0.073102, 0.000209, 0.026644],
    "mask": [0.071731, -0.003476, 0.028517],
}


@pytest.fixture(autouse=True)
def _standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # NumPyro mixes integers and floats
        yield


def model(x, y=None, num_obs_total=None):
    w = numpyro.sample("w", dist.Normal(0, 1).expand([3]).to_event(1))
    with numpyro.plate("data", num_obs_total, len(x)):
        numpyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def svi_of(optim=None, factor=None, dp_scale=0.0, num_obs_total=N, model=model, **options):
    zeros = numpyro.infer.init_to_value(values={"w": jnp.zeros(3)})
    program, guide = model, AutoDelta(model, init_loc_fn=zeros)
    if factor is not None:
        program, guide = scale(program, scale=factor), scale(guide, scale=factor)
    optim = numpyro.optim.SGD(1e-3) if optim is None else optim
    options = {"clipping_threshold": 0.3, "dp_scale": dp_scale} | options
    return DPSVI(program, guide, optim, Trace_ELBO(), num_obs_total=num_obs_total, **options)


def steps(svi, mask=None):
    state = svi.init(jax.random.PRNGKey(0), X[:B], Y[:B])
    kwargs = {} if mask is None else {"mask": jnp.arange(B) < mask}
    for i in range(3):
        rows = slice(i * B, (i + 1) * B)
        state, _ = svi.update(state, X[rows], Y[rows], **kwargs)
    return svi.get_params(state)["w_auto_loc"]


@pytest.mark.slow
@pytest.mark.parametrize("case", D3P)
def test_steps_are_those_of_d3p(case):
    sgd = numpyro.optim.SGD(0.2)
    options = {
        "plain": {},
        "handlers.scale": {"factor": 1 / N, "optim": sgd},
        "Adam": {"optim": numpyro.optim.Adam(0.1)},
        "clip with scale": {"clip_unscaled_observations": False, "optim": sgd},
        "mask": {"expected_batch_size": 30},
    }[case]
    ours = steps(svi_of(**options), mask=30 if case == "mask" else None)
    np.testing.assert_allclose(ours, D3P[case], atol=3e-6)


@pytest.mark.seconds
def test_sums_are_divided_by_a_public_number_instead_of_the_count():
    """d3p divides by 30, which it counts in the data."""
    half = steps(svi_of(expected_batch_size=B), mask=30)
    whole = steps(svi_of(expected_batch_size=30), mask=30)
    # The steps are short, so that their length is that of the gradient but for a few per cent.
    np.testing.assert_allclose(half / whole, 30 / B, rtol=0.1)


@pytest.mark.seconds
def test_the_noise_does_not_depend_on_the_mask():
    """Its deviation is sigma C N / expected size; in d3p it grows with the square of the mask."""
    svi = svi_of(optax.sgd(1.0), dp_scale=5.0, expected_batch_size=B)
    state = svi.init(jax.random.key(0), X[:B], Y[:B])

    @jax.jit
    def moves(keys, mask):
        def move(key):
            start = state._replace(opt_state=with_key(state.opt_state, key))
            moved, _ = svi.update(start, X[:B], Y[:B], mask=mask)
            return moved.params["w_auto_loc"]

        return jax.vmap(move)(keys)

    def with_key(opt_state, key):
        def replaced(leaf):
            return key if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf

        return jax.tree.map(replaced, opt_state)

    draws = 2000
    for size in (50, 30):
        drawn = moves(jax.random.split(jax.random.key(1), draws), jnp.arange(B) < size)
        found = math.sqrt(np.var(drawn, axis=0).mean())
        expected = 5.0 * 0.3 * N / B
        assert abs(found / expected - 1) < 4.5 / math.sqrt(2 * 3 * draws)


@pytest.mark.slow
def test_epsilon_is_that_of_the_sampler_that_ran():
    """d3p says 1.57 for all of them: that of Poisson batches."""
    key, run = d3p.random.PRNGKey(0), {"noise_multiplier": 1.0, "num_steps": 10, "delta": 1e-3}
    mb = d3p.minibatch
    laws = {
        mb.subsample_batchify_data: FixedSize(N, 20),
        mb.split_batchify_data: Shuffled(N, 20),
        mb.poisson_batchify_data: Poisson(N, 20),
    }
    found = {}
    for function, law in laws.items():
        init, get_batch = function(DATA, q=0.1)
        svi, state = svi_of(dp_scale=1.0), init(key)[1]
        batch = get_batch(0, state)
        batch, kwargs = (batch[0], {"mask": batch[1]}) if isinstance(law, Poisson) else (batch, {})
        svi_state = svi.init(key, *batch)
        found[law] = svi.get_epsilon(1e-3, 0.1, num_epochs=1)
        svi.update(svi_state, *batch, **kwargs)
        assert svi.get_epsilon(1e-3, 0.1, num_iter=10) == found[law]
        assert found[law] == epsilon(sampler=law, **run)
        delta = svi.get_delta(found[law], 0.1, num_epochs=1)
        assert delta == pytest.approx(1e-3, rel=1e-2)
        with pytest.raises(ValueError, match=r"q is the rate.*20 of 200; got 0\.2\. Pass 0\.1"):
            svi.get_epsilon(1e-3, 0.2, num_epochs=1)
    assert found[Poisson(N, 20)] == pytest.approx(1.5716668, rel=2e-2)
    assert found[FixedSize(N, 20)] > 1.5 * found[Poisson(N, 20)]


@pytest.mark.seconds
def test_epsilon_of_batches_from_elsewhere_needs_their_sampler():
    svi = svi_of(dp_scale=1.0)
    svi.init(jax.random.key(0), X[:20] + 0, Y[:20])
    with pytest.raises(ValueError, match="how batches are drawn, which is not known"):
        svi.get_epsilon(1e-3, 0.1, num_epochs=1)
    assert svi.get_epsilon(1e-3, 0.1, num_epochs=1, sampler=Poisson(N, 20)) < 2
    with pytest.raises(TypeError, match="either num_epochs or num_iter"):
        svi.get_epsilon(1e-3, 0.1, sampler=Poisson(N, 20))
    assert svi_of().get_delta(1.0, 0.1, num_iter=1, sampler=Poisson(N, 20)) == 1


@pytest.mark.seconds
def test_noise_for_poisson_batches_is_refused_for_others():
    dputil, key = d3p.dputil, d3p.random.PRNGKey(0)
    init, get_batch = d3p.minibatch.subsample_batchify_data(DATA, q=0.1)
    fixed = get_batch(0, init(key)[1])
    init, get_split = d3p.minibatch.split_batchify_data(DATA, q=0.1)
    split = get_split(0, init(key)[1])
    for_poisson, _, _ = dputil.approximate_sigma_remove_relation(8.0, 1e-3, 0.1, 10)
    for_fixed, _, _ = dputil.approximate_sigma(8.0, 1e-3, 0.1, 10)
    for sigma, batch, words in (
        (for_poisson, fixed, "batches of Poisson, but these are batches of FixedSize"),
        (for_poisson, (X[:20] + 0, Y[:20]), "of a law that is not known"),
        (for_fixed, split, "batches of FixedSize, but these are batches of Shuffled"),
    ):
        with pytest.raises(ValueError, match=words):
            svi_of(dp_scale=sigma).init(key, *batch)
    svi_of(dp_scale=for_fixed).init(key, *fixed)
    svi_of(dp_scale=float(for_poisson)).init(key, X[:20] + 0, Y[:20])


@pytest.mark.seconds
def test_a_padded_batch_without_its_mask_is_refused():
    init, get_batch = d3p.poisson_batchify_data(DATA, q=0.1, max_batch_size=0.99)
    batch, mask = get_batch(0, init(d3p.random.PRNGKey(0))[1])
    svi = svi_of()
    state = svi.init(d3p.random.PRNGKey(0), *batch)
    plain = batch.examples
    with pytest.raises(ValueError, match="this batch has no mask"):
        svi.update(state, *plain)
    with pytest.raises(ValueError, match="this batch has no mask"):
        svi.update(state, *plain, mask=True)
    same = [svi.update(state, *batch), svi.update(state, *plain, mask=mask)]
    np.testing.assert_array_equal(*(moved.params["w_auto_loc"] for moved, _ in same))
    nothing, _ = svi.update(state, *plain, mask=False)
    assert np.abs(nothing.params["w_auto_loc"]).max() < 1e-6


@pytest.mark.slow
def test_num_obs_total_reaches_those_who_take_it():
    seen = []

    def latent():
        return numpyro.sample("w", dist.Normal(0, 1).expand([3]).to_event(1))

    def observe(x, y, w):
        with numpyro.plate("data", N, len(x)):
            numpyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)

    def requires(x, y, *, num_obs_total):
        seen.append(num_obs_total)
        observe(x, y, latent())

    def takes_any(x, y, **kwargs):
        seen.append(kwargs["num_obs_total"])
        observe(x, y, latent())

    def neither(x, y):
        observe(x, y, latent())

    def guide_of(x, y):
        numpyro.sample("w", dist.Normal(numpyro.param("loc", jnp.zeros(3)), 1.0).to_event(1))

    def guide_that_takes(x, y, num_obs_total=None):
        seen.append(num_obs_total)
        guide_of(x, y)

    for program, guide in (
        (requires, guide_of), (takes_any, guide_that_takes), (neither, guide_that_takes),
    ):  # fmt: skip
        seen.clear()
        svi = DPSVI(program, guide, optax.sgd(1.0), Trace_ELBO(), 1.0, 0.0, num_obs_total=N)
        svi.init(jax.random.key(0), X[:B], Y[:B])
        assert set(seen) == {N}
    # Without it, N is the size of the plate.
    svi = DPSVI(neither, guide_of, optax.sgd(1.0), Trace_ELBO(), 1.0, 0.0)
    svi.init(jax.random.key(0), X[:B], Y[:B])
    assert svi._num_examples == N
    alone = svi_of(num_obs_total=None, model=lambda x, y=None: model(x, y, len(x)))
    with pytest.raises(ValueError, match="Pass num_obs_total="):
        alone.init(jax.random.key(0), X[:B], Y[:B])


@pytest.mark.untyped
def test_other_generators_are_refused():
    with pytest.raises(TypeError, match=r"rng_suite must be .*; got jax\.random"):
        svi_of(rng_suite=jax.random)
    svi_of(rng_suite=d3p.random.debug)


def test_gradients_are_clipped_as_one_vector():
    svi = d3p.svi
    gradient = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
    assert float(svi.full_norm(gradient)) == 5
    assert float(svi.full_norm(gradient, ord=1)) == 7
    assert float(svi.full_norm({})) == 0
    for function in (svi.normalize_gradient, lambda tree: svi.clip_gradient(tree, 1.0)):
        np.testing.assert_allclose(function(gradient)["a"], [0.6, 0.0], rtol=1e-6)
    np.testing.assert_array_equal(svi.clip_gradient(gradient, 9.0)["a"], gradient["a"])
    with pytest.raises(ValueError, match="c must be"):
        svi.clip_gradient(gradient, 0.0)
    kwargs = {"num_obs_total": N}
    assert svi.get_observations_scale(model, (X[:1], Y[:1]), kwargs, {}) == N
    scaled = scale(model, scale=0.5)
    assert svi.get_observations_scale(scaled, (X[:1], Y[:1]), kwargs, {}) == N / 2

    def two_scales(x, y):
        model(x, y, N)
        numpyro.sample("z", dist.Normal(), obs=0.0)

    with pytest.raises(ValueError, match=r"the scales \[1\.0, 200\.0\]"):
        svi.get_observations_scale(two_scales, (X[:1], Y[:1]), {}, {})


def test_adadp_moves_as_in_d3p():
    """Seven updates of d3p 0.2.0 on the gradient (2 x, 0.6 y) from (4, 2)."""
    optimizer = d3p.optimizers.ADADP(0.3)
    state = optimizer.init(jnp.array([4.0, 2.0]))
    for _ in range(7):
        gradient = 2 * jnp.array([1.0, 0.3]) * optimizer.get_params(state)
        state = optimizer.update(gradient, state)
    np.testing.assert_allclose(optimizer.get_params(state), [0.214458, 0.939727], atol=2e-6)
    with pytest.raises(ValueError, match="alpha_max is at least alpha_min"):
        d3p.optimizers.adadp(alpha_min=1.2)
    with pytest.raises(ValueError, match="step_size must be"):
        d3p.optimizers.ADADP(0.0)


def test_a_large_error_undoes_a_pair_of_steps():
    init, update, get_params = d3p.optimizers.adadp(3.0, tol=0.1, alpha_min=0.25)
    state = init({"x": jnp.array(4.0)})
    for i in range(2):
        state = update(i, {"x": 2 * get_params(state)["x"]}, state)
    assert get_params(state)["x"] == 4
    assert state.learning_rate == 0.75
    init, update, get_params = d3p.optimizers.adadp(3.0, tol=0.1, stability_check=False)
    state = init({"x": jnp.array(4.0)})
    for i in range(2):
        state = update(i, {"x": 2 * get_params(state)["x"]}, state)
    assert get_params(state)["x"] != 4


@pytest.mark.slow
def test_a_gaussian_mixture_is_that_of_its_formula():
    locs, scales = jnp.array([[0.0, 1.0], [3.0, -2.0]]), jnp.array([[1.0], [0.5]])
    weights = jnp.array([0.3, 0.7])
    mixture = d3p.gmm.GaussianMixture(locs, scales, weights)
    x = jnp.array([[0.2, 0.1], [3.0, -1.0]])
    components = jnp.exp(dist.Normal(locs, scales).log_prob(x[:, None])).prod(-1)
    np.testing.assert_allclose(mixture.log_prob(x), jnp.log(components @ weights), rtol=1e-5)
    draws, [which] = mixture.sample_with_intermediates(jax.random.key(0), (20_000,))
    assert abs(which.mean() - 0.7) < 4.5 * math.sqrt(0.21 / 20_000)
    error = 4.5 * np.sqrt(mixture.variance / 20_000)
    assert (np.abs(draws.mean(0) - mixture.mean) < error).all()
    np.testing.assert_array_equal(mixture.locs, locs)
    np.testing.assert_allclose(mixture.scales, scales * jnp.ones((2, 2)), rtol=1e-6)
    assert mixture.num_components == len(mixture.mixture_probabilities) == 2


@pytest.mark.seconds
def test_draws_of_the_posterior_predictive_follow_the_guide():
    def guide(x, num_obs_total=None):
        loc = numpyro.param("loc", jnp.zeros(3))
        numpyro.sample("w", dist.Normal(loc, 1e-3).to_event(1))

    params = {"loc": jnp.array([100.0, 0.0, 0.0])}
    x, kwargs = jnp.eye(3)[:1], {"num_obs_total": 1}
    draws = d3p.modelling.sample_multi_posterior_predictive(
        jax.random.PRNGKey(0), 50, model, (x,), guide, (x,), params, **kwargs
    )
    np.testing.assert_allclose(draws["w"].mean(0), params["loc"], atol=1e-3)
    assert draws["y"].shape == (50, 1)
    assert draws["y"].all()
    value, inner = d3p.modelling.sample_posterior_predictive(
        jax.random.key(0), model, (x,), guide, (x,), params, with_intermediates=True, **kwargs
    )["w"]
    assert value.shape == (3,)
    assert inner == []
