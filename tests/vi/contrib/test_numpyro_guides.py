"""Scaled and natural gradients and traces for NumPyro guides: what our own mean field gives."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.distributions import biject_to, constraints
from numpyro.infer import Trace_ELBO, autoguide

import dpoptax
from dpoptax.transforms import scale_then_privatize
from dpoptax.vi import global_elbo, guides
from dpoptax.vi.contrib import (
    mean_field_scale,
    natural_gradient,
    noise_aware_posterior,
    trace_gradients,
)
from dpoptax.vi.numpyro import DPSVI, numpyro_elbo

N, D, NOISE = 200, 3, 0.5
TRIL = biject_to(constraints.scaled_unit_lower_cholesky)


@pytest.fixture(autouse=True)
def _standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # NumPyro mixes integers and floats
        yield


def model(x, y):
    bias = numpyro.sample("bias", dist.Normal(0.0, 1.0))
    weights = numpyro.sample("weights", dist.Normal(0.0, 1.0).expand([D]).to_event(1))
    with numpyro.plate("data", N, subsample_size=len(x)):
        numpyro.sample("y", dist.Normal(bias + x @ weights, NOISE), obs=y)


# The parameters of a mean field over `bias` and `weights`, and as each guide of NumPyro names them.
# A parameter of the model stands beside them.
def as_own(loc, raw):
    return {"loc": {"bias": loc[0], "weights": loc[1:]}, "raw_scale": raw}


def as_normal(loc, raw):
    locs = {"bias_auto_loc": loc[0], "weights_auto_loc": loc[1:]}
    return locs | {"bias_auto_scale": raw[0], "weights_auto_scale": raw[1:], "other_scale": raw}


def as_diagonal(loc, raw):
    return {"auto_loc": loc, "auto_scale": raw, "other_scale": raw}


def as_full_rank(loc, raw):
    return {"auto_loc": loc, "auto_scale_tril": TRIL.inv(jnp.diag(jax.nn.softplus(raw)))}


def as_low_rank(loc, raw):
    return {"auto_loc": loc, "auto_scale": raw, "auto_cov_factor": jnp.zeros((len(loc), 2))}


MEAN_FIELDS = {"AutoNormal": as_normal, "AutoDiagonalNormal": as_diagonal}
NORMALS = MEAN_FIELDS | {
    "AutoMultivariateNormal": as_full_rank,
    "AutoLowRankMultivariateNormal": as_low_rank,
}
LOC, RAW = jnp.array([0.3, -1.0, 2.0, 0.1]), jnp.array([-2.0, 1.0, 0.5, -0.3])
GRADIENT = jnp.array([1.0, -2.0, 0.4, 0.7]), jnp.array([0.5, 3.0, -1.0, 0.2])


def guide_of(name):
    return getattr(autoguide, name)(model)


def assert_same(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), found, expected
    )


@pytest.mark.parametrize("name", MEAN_FIELDS)
def test_natural_gradients_are_those_of_our_mean_field(name):
    named = MEAN_FIELDS[name]
    found, _ = natural_gradient(guide_of(name)).update(named(*GRADIENT), None, named(LOC, RAW))
    own, _ = natural_gradient().update(as_own(*GRADIENT), None, as_own(LOC, RAW))
    loc = jnp.concatenate([own["loc"]["bias"][None], own["loc"]["weights"]])
    # What does not belong to the guide keeps its gradient.
    assert_same(found, named(loc, own["raw_scale"]) | {"other_scale": GRADIENT[1]})


@pytest.mark.parametrize("name", MEAN_FIELDS)
def test_scales_before_the_clip_are_those_of_our_mean_field(name):
    named = MEAN_FIELDS[name]
    own = mean_field_scale(as_own(LOC, RAW))["raw_scale"]
    found = mean_field_scale(named(LOC, RAW), guide_of(name))
    assert_same(found, named(jnp.ones(D + 1), own) | {"other_scale": jnp.ones(D + 1)})


def traced(named, guide):
    """Returns the noise-aware posterior after five steps at other locations, with noise."""
    tx = trace_gradients(5, guide)
    state = tx.init(named(LOC, RAW))
    for step in range(5):
        draw = jax.random.normal(jax.random.key(step), (2, D + 1))
        _, state = tx.update(named(draw[0], RAW), state, named(LOC + 0.1 * draw[1], RAW))
    return noise_aware_posterior(named(LOC, RAW), state, num_examples=7, guide=guide)


@pytest.mark.seconds
@pytest.mark.parametrize("name", NORMALS)
def test_noise_aware_posteriors_are_those_of_our_mean_field(name):
    own, found = traced(as_own, None), traced(NORMALS[name], guide_of(name))
    loc = jnp.concatenate([own["loc"]["bias"][None], own["loc"]["weights"]])
    expected = NORMALS[name](loc, own["raw_scale"])
    if name == "AutoMultivariateNormal":
        # It also keeps the correlations of what was measured: its variances are the same.
        tril = TRIL(found.pop("auto_scale_tril"))
        variances = jax.nn.softplus(own["raw_scale"]) ** 2
        assert_same(jnp.diag(tril @ tril.T), variances)
        expected.pop("auto_scale_tril")
    if "other_scale" in expected:
        expected["other_scale"] = RAW
    assert_same(found, expected)


@pytest.mark.parametrize("name", ["AutoMultivariateNormal", "AutoLowRankMultivariateNormal"])
def test_correlated_guides_use_their_whole_covariance(name):
    rng = np.random.default_rng(0)
    if name == "AutoMultivariateNormal":
        tril = np.tril(rng.normal(size=(4, 4)), -1) + np.diag([1.0, 0.5, 2.0, 1.0])
        covariance = tril @ tril.T
        shape = {"auto_scale_tril": TRIL.inv(jnp.asarray(tril, jnp.float32))}
    else:
        factor, scale = rng.normal(size=(4, 2)), np.log1p(np.exp(np.asarray(RAW)))
        covariance = np.diag(scale) @ (np.eye(4) + factor @ factor.T) @ np.diag(scale)
        shape = {"auto_scale": RAW, "auto_cov_factor": jnp.asarray(factor, jnp.float32)}
    guide = guide_of(name)
    tx = trace_gradients(6, guide)
    params = {"auto_loc": LOC, **shape}
    state, measured = tx.init(params), []
    for _ in range(6):
        gradient, location = rng.normal(size=(2, 4))
        _, state = tx.update(
            params | {"auto_loc": jnp.asarray(gradient, jnp.float32)},
            state,
            params | {"auto_loc": jnp.asarray(location, jnp.float32)},
        )
        measured.append(location - 7 * covariance @ gradient)
    found = noise_aware_posterior(params, state, num_examples=7, guide=guide)
    np.testing.assert_allclose(found["auto_loc"], np.mean(measured, axis=0), rtol=1e-4)
    more = np.cov(np.transpose(measured)) / 6
    if name == "AutoMultivariateNormal":
        tril = TRIL(found["auto_scale_tril"])
        np.testing.assert_allclose(tril @ tril.T, covariance + more, rtol=1e-3, atol=1e-3)
    else:
        scale = np.diag(jax.nn.softplus(found["auto_scale"]))
        factor = found["auto_cov_factor"]
        wider = scale @ (np.eye(4) + factor @ factor.T) @ scale
        expected = covariance + np.diag(np.diag(more))
        np.testing.assert_allclose(wider, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.untyped
def test_other_guides_are_refused_by_name():
    full = guide_of("AutoMultivariateNormal")
    with pytest.raises(TypeError, match=r"natural_gradient is for.*got AutoMultivariateNormal"):
        natural_gradient(full)
    with pytest.raises(TypeError, match=r"mean_field_scale is for.*got AutoMultivariateNormal"):
        mean_field_scale(as_full_rank(LOC, RAW), full)
    for guide in (autoguide.AutoDelta(model), guides.FullRank(jnp.zeros(2)), model):
        with pytest.raises(TypeError, match="no location and scale that this tool knows"):
            trace_gradients(5, guide)

    class Exponential(autoguide.AutoNormal):
        pass

    with pytest.raises(TypeError, match="no location and scale"):
        natural_gradient(Exponential(model))
    guide = autoguide.AutoNormal(model)
    guide.scale_constraint = constraints.positive
    with pytest.raises(TypeError, match="expected NumPyro's default, softplus_positive"):
        natural_gradient(guide)


@pytest.fixture(scope="module")
def data():
    x_key, y_key = jax.random.split(jax.random.key(0))
    x = jax.random.normal(x_key, (N, D))
    return x, 0.3 + x @ jnp.array([1.0, -2.0, 0.5]) + NOISE * jax.random.normal(y_key, (N,))


def log_likelihood(latents, example):
    x, y = example
    return -0.5 * ((y - latents["bias"] - x @ latents["weights"]) / NOISE) ** 2


def train(elbo, params, guide, data, steps=300):
    """Trains by natural gradients on full batches, with no noise and no clip."""
    private = dpoptax.privatize(1e9, 0.0, expected_batch_size=N, key=jax.random.key(1))
    tx = optax.chain(
        elbo.wrap(private, jax.random.key(2)),
        natural_gradient(guide),
        # N times the natural gradient is a step of Newton's method.
        optax.sgd(optax.exponential_decay(0.05 * N, steps, 0.2)),
    )
    grads_of = dpoptax.per_example_grads(elbo.loss, allow_unused=True)

    @jax.jit
    def run(params):
        def step(carry, key):
            params, state = carry
            updates, state = tx.update(grads_of(params, data, key=key), state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.key(3), steps)
        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
        return params

    return run(params)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["AutoDiagonalNormal", pytest.param("AutoNormal", marks=pytest.mark.nightly)]
)
def test_without_clip_and_noise_both_guides_reach_the_same_posterior(name, data):
    """Linear regression, where the best mean field is known."""
    own_guide = guides.MeanField({"bias": jnp.zeros(()), "weights": jnp.zeros(D)})
    own_params = own_guide.init(jax.random.key(0), jax.random.key(0))["params"]
    own = train(global_elbo(own_guide, log_likelihood, num_examples=N), own_params, None, data)
    guide = guide_of(name)
    elbo = numpyro_elbo(model, guide, *data, num_examples=N, init_key=jax.random.key(0))
    found = train(elbo, elbo.init(), guide, data)
    if name == "AutoNormal":
        locs = found["bias_auto_loc"][None], found["weights_auto_loc"]
        raws = found["bias_auto_scale"][None], found["weights_auto_scale"]
        loc, raw = jnp.concatenate(locs), jnp.concatenate(raws)
    else:
        loc, raw = found["auto_loc"], found["auto_scale"]
    inputs = np.column_stack([np.ones(N), data[0]])
    precision = np.eye(D + 1) + inputs.T @ inputs / NOISE**2
    mean = np.linalg.solve(precision, inputs.T @ np.asarray(data[1]) / NOISE**2)
    stddev = np.diag(precision) ** -0.5
    own_loc = jnp.concatenate([own["loc"]["bias"][None], own["loc"]["weights"]])
    for center, scale in ((own_loc, own["raw_scale"]), (loc, raw)):
        # Draws differ between the two, and each example has its own: a few percent of a stddev.
        assert np.abs((center - mean) / stddev).max() < 0.2
        np.testing.assert_allclose(jax.nn.softplus(scale), stddev, rtol=0.1)


@pytest.mark.slow
def test_dpsvi_runs_with_scales_before_the_clip_and_traces(data):
    guide = guide_of("AutoNormal")
    optimizer = optax.chain(trace_gradients(100, guide), optax.adam(0.02))
    optimizer = scale_then_privatize(
        optimizer, scale=lambda params: mean_field_scale(params, guide)
    )
    svi = DPSVI(
        model, guide, optimizer, Trace_ELBO(), clipping_threshold=5.0, dp_scale=1.0, num_obs_total=N
    )
    sampler = dpoptax.samplers.Poisson(N, 50)
    result = svi.run(
        dpoptax.random.insecure_key(0), 640, *data, sampler=sampler, progress_bar=False
    )
    least_squares = np.linalg.lstsq(np.column_stack([np.ones(N), data[0]]), data[1], rcond=None)[0]
    assert np.abs(result.params["weights_auto_loc"] - least_squares[1:]).max() < 0.2
    aware = noise_aware_posterior(
        result.fit.params, result.optimizer_state, num_examples=N, guide=guide
    )
    values = result.elbo.constrain(aware)
    assert np.all(values["weights_auto_scale"] > result.last_params["weights_auto_scale"])
