"""DPSVI.run: what it recommends, warm starts, draws from the posterior, and losses."""

import attrs
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import Trace_ELBO, autoguide

import dpoptax
from dpoptax.transforms import average_params
from dpoptax.vi.numpyro import DPSVI, Predictive

N, STEPS = 200, 64
SAMPLER = dpoptax.samplers.Poisson(N, 40)
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("dpsvi_run")]


@pytest.fixture(autouse=True)
def _standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # NumPyro mixes integers and floats
        yield


def model(x):
    mean = numpyro.sample("mean", dist.Normal(0.0, 10.0))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("data", N, subsample_size=len(x)):
        numpyro.sample("x", dist.Normal(mean, scale), obs=x)


X = jnp.linspace(0.0, 2.0, N)
RUN = {"sampler": SAMPLER, "delta": 1e-4, "progress_bar": False}


def make(optim=None):
    guide = autoguide.AutoNormal(model)
    optim = numpyro.optim.Adam(0.05) if optim is None else optim
    return DPSVI(
        model, guide, optim, Trace_ELBO(), clipping_threshold=2.0, dp_scale=2.0, num_obs_total=N
    )


@pytest.fixture(scope="module")
def svi():
    return make()


@pytest.fixture(scope="module")
def first(svi):
    with jax.numpy_dtype_promotion("standard"):
        return svi.run(dpoptax.random.insecure_key(0), STEPS, X, **RUN, nonprivate_losses=True)


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, dict(found), dict(expected))


def test_the_last_iterate_and_the_recommendation_stand_side_by_side(first):
    assert_equal(first.last_params, first.elbo.constrain(first.fit.params))
    state = first.fit.state.opt_state[1][1]
    means = {name: state.block_means[name] for name in first.fit.params}
    length = STEPS // 32
    for name, steps in first.convergence.num_averaged_steps.items():
        expected = first.last_params[name]
        if steps:
            average = jnp.mean(means[name][16 - steps // length :], axis=0)
            expected = first.elbo.transforms[name](average)
        np.testing.assert_allclose(first.params[name], expected, rtol=1e-6)
    assert set(first.convergence.rhat) == set(first.params)


def test_an_average_that_the_user_asks_for_has_precedence():
    optimizer = optax.chain(optax.sgd(0.5), average_params(start=10))
    result = make(optimizer).run(dpoptax.random.insecure_key(0), STEPS, X, **RUN)
    assert_equal(result.params, result.elbo.constrain(result.fit.averaged_params))


def test_draws_are_those_of_the_guide(first):
    draws = first.posterior(jax.random.key(1), 4000)
    assert {name: draw.shape for name, draw in draws.items()} == {"mean": (4000,), "scale": (4000,)}
    loc, stddev = first.params["mean_auto_loc"], first.params["mean_auto_scale"]
    # Of 4,000 draws, the mean has a standard error of stddev / 63, and the deviation one of 1.1 %.
    assert abs(float(draws["mean"].mean() - loc)) < 5 * float(stddev) / 63
    np.testing.assert_allclose(draws["mean"].std(), stddev, rtol=0.06)
    np.testing.assert_allclose(np.log(draws["scale"]).mean(), first.params["scale_auto_loc"],
                               atol=5 * float(first.params["scale_auto_scale"]) / 63)  # fmt: skip
    predicted = Predictive(model, draws)(jax.random.key(2), X[:7])
    assert predicted["x"].shape == (4000, 7)
    assert float(predicted["x"].std()) > 0.1  # the observations are not returned


def test_losses_are_kept_under_a_name_that_says_what_they_are(first, svi):
    assert first.nonprivate_losses.shape == (STEPS,)
    assert float(first.nonprivate_losses[-8:].mean()) < float(first.nonprivate_losses[:8].mean())
    assert "nonprivate_losses" not in repr(first)
    for name, words in (("losses", "nonprivate_losses=True"), ("state", "init_state=result")):
        with pytest.raises(AttributeError, match=words):
            getattr(first, name)
    # Of the same scale as those of `update`.
    state = svi.init(dpoptax.random.insecure_key(3), X)
    loss = svi.evaluate(state, X)
    np.testing.assert_allclose(first.nonprivate_losses[0], loss, rtol=0.5)


def test_a_warm_start_goes_on_and_both_runs_are_charged(first, svi):
    key = dpoptax.random.insecure_key(1)
    second = svi.run(key, 1, X, **RUN, init_state=first)
    assert int(first.optimizer_state[0]) == STEPS  # NumPyro's count of steps
    assert int(second.optimizer_state[0]) == STEPS + 1
    # One step of Adam with rate .05 from where the first run ended.
    for name, value in first.fit.params.items():
        moved = second.fit.params[name] - value
        assert 0 < float(jnp.abs(moved)) <= 0.05 * 1.01
    ledger = dpoptax.accounting.Ledger(second.fit.plan.sampler, 2.0, delta=1e-4)
    ledger.charge_event(first.fit.ledger.event())
    ledger.charge(2.0, 1)
    assert second.report().epsilon == pytest.approx(ledger.epsilon())
    assert second.report().epsilon > first.report().epsilon


def test_noise_and_batches_of_a_warm_start_are_new(first, svi):
    keys = [dpoptax.random.insecure_key(seed) for seed in (1, 2)]
    one, other = (svi.run(key, 1, X, **RUN, init_state=first) for key in keys)
    assert one.fit.params["mean_auto_loc"] != other.fit.params["mean_auto_loc"]
    with pytest.raises(ValueError, match="rng_key is that of the earlier run"):
        svi.run(dpoptax.random.insecure_key(0), 1, X, **RUN, init_state=first)


def test_given_initial_values_are_the_start(svi):
    given = {"mean_auto_loc": jnp.array(0.7), "scale_auto_scale": jnp.array(0.02)}
    result = svi.run(dpoptax.random.insecure_key(1), 1, X, **RUN, init_params=given)
    assert abs(float(result.last_params["mean_auto_loc"]) - 0.7) < 0.051
    raw = result.fit.params["scale_auto_scale"] - jnp.log(jnp.expm1(0.02))
    assert abs(float(raw)) < 0.051
    assert "too short to tell" in str(result.convergence)


@pytest.mark.untyped
def test_warm_starts_that_do_not_fit_are_refused(first, svi):
    key = dpoptax.random.insecure_key(1)
    state = svi.init(key, X)
    bad_optimizer = make(optax.sgd(0.1))
    cases = [
        ({"init_state": state}, TypeError, "holds noise keys and a count of steps"),
        ({"init_state": first, "init_params": first.params}, ValueError, "Pass one of them"),
        ({"init_params": first}, TypeError, "init_state=result to go on"),
        ({"init_params": {"slope": 1.0}}, ValueError, r"\['slope'\], which are no parameters"),
        ({"init_params": {"mean_auto_loc": jnp.ones(2)}}, ValueError, "the shapes"),
        ({"init_params": {"mean_auto_scale": -1.0}}, ValueError, "not finite, or lies outside"),
    ]
    for options, kind, words in cases:
        with pytest.raises(kind, match=words):
            svi.run(key, 1, X, **RUN, **options)
    with pytest.raises(ValueError, match="another optimizer, whose state does not fit"):
        bad_optimizer.run(key, 1, X, **RUN, init_state=first)
    # An optimizer that draws noise would draw it again.
    noisy = make(optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(0.1)))
    before = noisy.run(dpoptax.random.insecure_key(2), 1, X, **RUN)
    with pytest.raises(ValueError, match="keeps a PRNG key in its state"):
        noisy.run(key, 1, X, **RUN, init_state=before)


def test_the_key_of_a_run_is_not_printed(first):
    words = jax.random.key_data(first.root)
    assert "root" not in repr(first)
    assert not any(str(int(word)) in repr(first) for word in np.ravel(words) if word > 9999)
    assert attrs.fields(type(first)).root.repr is False
