"""Bayesian linear regression, whose posterior has a closed form, under clip and noise."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpoptax
from dpoptax.vi import aligned_elbo, global_elbo, guides

N, D, NOISE = 1000, 5, 0.5


class Regression(NamedTuple):
    data: tuple
    mean: np.ndarray
    covariance: np.ndarray


def log_likelihood(weights, example, *, noise=NOISE):
    x, y = example
    return -0.5 * ((y - x @ weights) / noise) ** 2 - math.log(noise * math.sqrt(2 * math.pi))


def standard_normal(weights):
    return -0.5 * jnp.sum(weights**2) - 0.5 * weights.size * math.log(2 * math.pi)


def a_regression(noise, width):
    """Weights from N(0, width**2), and correlated inputs: mean field and full rank differ."""
    x_key, w_key, y_key = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(x_key, (N, D)).at[:, 1].mul(0.6)
    x = x.at[:, 1].add(0.8 * x[:, 0])
    y = x @ (width * jax.random.normal(w_key, (D,))) + noise * jax.random.normal(y_key, (N,))
    precision = np.eye(D) / width**2 + np.asarray(x.T @ x, float) / noise**2
    covariance = np.linalg.inv(precision)
    return Regression((x, y), covariance @ np.asarray(x.T @ y, float) / noise**2, covariance)


@pytest.fixture(scope="module")
def regression():
    return a_regression(NOISE, 1.0)


def start(guide):
    return guide.init(jax.random.key(0), jax.random.key(0))["params"]


def fit(elbo, data, *, steps, rate):
    plan = dpoptax.Plan(
        sampler=dpoptax.samplers.Poisson(N, N), clip=math.inf, noise_multiplier=0.0,
        num_steps=steps, delta=1e-5,
    )  # fmt: skip
    with jax.numpy_dtype_promotion("standard"):  # optax.adam mixes integers and floats
        return dpoptax.training.fit(
            elbo, start(elbo.guide), data, plan=plan, key=jax.random.key(0), progress=False,
            optimizer=optax.adam(optax.exponential_decay(rate, steps, 0.001)),
        ).params  # fmt: skip


def scales(guide, guide_params):
    draws = jax.vmap(lambda key: guide.apply({"params": guide_params}, key))(
        jax.random.split(jax.random.key(9), 20_000)
    )
    return np.cov(np.asarray(draws, float).T)


PRIORS = {"scale": 1.0, "density": pytest.param(standard_normal, marks=pytest.mark.slow)}


@pytest.mark.slow
@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
@pytest.mark.parametrize("make", [global_elbo, aligned_elbo])
@pytest.mark.parametrize("rank", ["mean field", "full rank"])
def test_without_noise_the_posterior_is_the_closed_form(regression, rank, make, prior):
    """One draw per step leaves a Monte Carlo error; it is smaller with a draw per example."""
    full = rank == "full rank"
    guide = (guides.FullRank if full else guides.MeanField)(jnp.zeros(D), initial_scale=0.03)
    guide_params = fit(make(guide, log_likelihood, prior, num_examples=N), regression.data,
              steps=3000, rate=0.1)  # fmt: skip
    expected = regression.covariance
    if not full:  # the best mean field keeps the precisions, and loses variance
        expected = np.diag(1 / np.diag(np.linalg.inv(regression.covariance)))
    spread = np.sqrt(np.diag(expected))
    error = np.abs(np.asarray(guide_params["loc"]) - regression.mean).max()
    assert error < (0.2 if make is global_elbo else 0.5) * spread.max()
    found = scales(guide, guide_params)
    np.testing.assert_allclose(np.sqrt(np.diag(found)) / spread, 1, atol=0.15)
    correlation = found[0, 1] / math.sqrt(found[0, 0] * found[1, 1])
    truth = expected[0, 1] / math.sqrt(expected[0, 0] * expected[1, 1])
    assert abs(correlation - truth) < 0.15
    assert abs(truth) > 0.5 or not full  # so that the test of the correlation has power


def one_update(elbo, data, guide_params, *, clip=math.inf, noise_multiplier=0.0, seed=0):
    private = dpoptax.privatize(
        clip, noise_multiplier, expected_batch_size=N, key=jax.random.key(seed)
    )
    tx = optax.chain(elbo.wrap(private, jax.random.key(1)), optax.sgd(1.0))

    @jax.jit
    def step(state):
        point = elbo.gradient_point(guide_params, state)
        grads = dpoptax.per_example_grads(elbo.loss)(point, data, key=jax.random.key(2))
        return tx.update(grads, state, guide_params)[0]

    return step(tx.init(guide_params))


@pytest.mark.slow
@pytest.mark.parametrize("make", [global_elbo, aligned_elbo])
def test_without_clip_and_noise_a_step_is_the_plain_gradient_of_the_elbo(regression, make):
    """The reference uses the same draws, and differentiates the whole sum by all parameters."""
    guide = guides.FullRank(jnp.zeros(D))
    elbo = make(guide, log_likelihood, num_examples=N)
    guide_params = jax.tree.map(lambda leaf: leaf + 0.1, start(guide))
    found = one_update(elbo, regression.data, guide_params)

    def plain(guide_params):
        if make is aligned_elbo:
            tx = elbo.wrap(
                dpoptax.privatize(1.0, 0.0, expected_batch_size=N, key=jax.random.key(0)),
                jax.random.key(1),
            )
            losses = 0.0
            for base_noise in tx.init(guide_params).aligned_draws:
                latents = guide.apply({"params": guide_params}, base_noise, method="transform")
                minus = jax.vmap(lambda example, at=latents: -log_likelihood(at, example))
                losses += minus(regression.data) / elbo.num_samples
        else:
            keys = jax.random.split(jax.random.key(2), N)
            losses = jax.vmap(elbo.loss, in_axes=(None, 0, 0))(guide_params, regression.data, keys)
        return jnp.sum(losses) / N + guide.apply({"params": guide_params}, 1.0, method="kl") / N

    expected = jax.grad(plain)(guide_params)
    for name, leaf in found.items():
        np.testing.assert_allclose(leaf, -expected[name], rtol=2e-4, atol=2e-5)


@pytest.mark.seconds
@pytest.mark.parametrize(("kl", "l2_clip"), [("clipped", math.inf), ("after_noise", 1e-3)])
def test_the_divergence_enters_once_and_only_a_clipped_one_is_clipped(kl, l2_clip):
    guide = guides.MeanField(jnp.ones(3))
    no_data = lambda latents, x: 0.0 * jnp.sum(latents) * x  # noqa: E731
    elbo = global_elbo(guide, no_data, prior=2.0, num_examples=50, kl=kl)
    guide_params = start(guide)
    tx = elbo.wrap(
        dpoptax.privatize(l2_clip, 0.0, expected_batch_size=8, key=jax.random.key(0)),
        jax.random.key(1),
    )
    grads_fn = dpoptax.per_example_grads(elbo.loss, form="stacked", allow_unused=True)
    grads = jax.jit(grads_fn)(guide_params, jnp.ones(8), key=jax.random.key(2))
    found, _ = jax.jit(tx.update)(grads, tx.init(guide_params), guide_params)
    expected = jax.grad(elbo.kl)(guide_params, jax.random.key(3))
    for name, leaf in found.items():
        assert jnp.linalg.norm(expected[name]) > 0.1
        np.testing.assert_allclose(leaf, expected[name] / 50, rtol=1e-5)


@pytest.mark.slow
def test_a_clipped_divergence_shrinks_with_the_likelihood_and_an_unclipped_one_does_not(regression):
    """Far from the prior, with a tiny clip, the unclipped divergence pulls back to the prior."""
    guide = guides.MeanField(jnp.full(D, 1000.0))
    guide_params = start(guide)
    clip = 1e-6
    steps = {
        kl: np.asarray(
            one_update(
                global_elbo(guide, log_likelihood, num_examples=N, kl=kl),
                regression.data, guide_params, clip=clip,
            )["loc"]
        )
        for kl in ("after_noise", "clipped")
    }  # fmt: skip
    assert np.linalg.norm(steps["clipped"]) <= clip
    np.testing.assert_allclose(steps["after_noise"], -1000 / N, rtol=1e-4)


@pytest.mark.slow
def test_aligned_gradients_noise_the_location_alone(regression):
    """With other noise the scale's gradient changes by the location's times base_noise T'(raw)."""
    guide = guides.MeanField(jnp.zeros(D))
    guide_params = start(guide)
    elbo = aligned_elbo(guide, log_likelihood, num_examples=N, num_samples=1)
    one, two = (
        one_update(elbo, regression.data, guide_params, clip=1.0, noise_multiplier=100.0, seed=seed)
        for seed in range(2)
    )
    (base_noise,) = elbo.wrap(optax.identity(), jax.random.key(1)).init(guide_params).aligned_draws
    slope = jax.nn.sigmoid(guide_params["raw_scale"])
    moved = {name: one[name] - two[name] for name in one}
    np.testing.assert_allclose(moved["raw_scale"], slope * base_noise * moved["loc"], rtol=1e-4)
    assert float(jnp.linalg.norm(moved["loc"])) > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("num_samples", [1, 2, 3, 4])
def test_a_clip_and_its_noise_mean_the_same_for_any_number_of_draws(regression, num_samples):
    """If a guide has almost no width, its draws agree, and so do the clipped and noised values."""
    guide = guides.MeanField(jnp.zeros(D), initial_scale=1e-6)
    guide_params, data = start(guide), regression.data
    elbo = aligned_elbo(guide, log_likelihood, num_examples=N, num_samples=num_samples)
    point = elbo.gradient_point(
        guide_params, elbo.wrap(optax.identity(), jax.random.key(1)).init(guide_params)
    )
    grads = dpoptax.per_example_grads(elbo.loss)(point, data, key=jax.random.key(2))
    norms = jnp.sqrt(sum(jax.tree.leaves(grads.squared_norms())))
    plain = jax.vmap(jax.grad(log_likelihood), (None, 0))(jnp.zeros(D), data)
    np.testing.assert_allclose(norms, jnp.linalg.norm(plain, axis=1), rtol=1e-3)

    def noise(key):
        private = dpoptax.privatize(1.0, 1e4, expected_batch_size=N, key=key)
        tx = elbo.wrap(private, jax.random.key(1))
        return tx.update(grads, tx.init(guide_params), guide_params)[0]["loc"]

    keys = jax.random.split(jax.random.key(3), 4000)
    found = np.asarray(jax.jit(jax.vmap(noise))(keys)) * N / 1e4
    assert abs(found.std() - 1) < 4.5 / math.sqrt(2 * found.size)


def test_draws_come_in_pairs_of_opposite_noise():
    guide = guides.MeanField(jnp.zeros(D))
    elbo = aligned_elbo(guide, log_likelihood, num_examples=N, num_samples=5)
    draws = elbo.wrap(optax.identity(), jax.random.key(0)).init(start(guide)).aligned_draws
    assert len(draws) == 5
    np.testing.assert_array_equal(draws[3], -draws[0])
    np.testing.assert_array_equal(draws[4], -draws[1])
    assert len({float(draw[0]) for draw in draws}) == 5


class Errors(NamedTuple):
    """Errors of the mean and of the scale, one for each key."""

    mean: np.ndarray
    scale: np.ndarray


# Noise, width of the prior, learning rate and clip, for posteriors of width .016 and 1.8.
POSTERIORS = {"narrow": (0.5, 1.0, 0.1, 2.0), "wide": (60.0, 10.0, 0.3, 0.01)}
RUNS = 40


# The tests that read these errors run on one worker, which computes them once.
shared_errors = pytest.mark.xdist_group("errors at epsilon one")


@pytest.fixture(scope="module", params=POSTERIORS)
def errors_at_epsilon_one(request):
    """Errors by kind of gradient, over forty keys, at epsilon 1."""
    noise, width, rate, clip = POSTERIORS[request.param]
    steps, sampler = 1000, dpoptax.samplers.Poisson(N, 200)
    data, mean, covariance = a_regression(noise, width)
    multiplier, _ = dpoptax.accounting.calibrate_noise_multiplier(
        epsilon=1.0, delta=1e-5, sampler=sampler, num_steps=steps
    )
    guide = guides.MeanField(jnp.zeros(D))
    spread = 1 / np.sqrt(np.diag(np.linalg.inv(covariance)))

    def train(elbo, key):
        noise_key, sampling_key, model_key = jax.random.split(key, 3)
        tx = optax.chain(
            elbo.wrap(
                dpoptax.privatize(clip, multiplier, expected_batch_size=200, key=noise_key),
                model_key,
            ),
            optax.adam(optax.exponential_decay(rate, steps, 0.01)),
        )
        step = dpoptax.training.make_train_step(elbo, tx=tx, sampler=sampler)
        state = dpoptax.training.init_state(
            start(guide), tx=tx, sampler=sampler, sampling_key=sampling_key, model_key=model_key
        )
        return jax.lax.fori_loop(0, steps, lambda _, state: step(state, data)[0], state).params

    def errors(make, num_samples):
        elbo = make(
            guide, functools.partial(log_likelihood, noise=noise), width,
            num_examples=N, num_samples=num_samples,
        )  # fmt: skip
        with jax.numpy_dtype_promotion("standard"):  # optax.adam mixes integers and floats
            keys = jax.random.split(jax.random.key(0), RUNS)
            guide_params = jax.jit(jax.vmap(lambda key: train(elbo, key)))(keys)
        scale = np.asarray(jax.nn.softplus(guide_params["raw_scale"]))
        return Errors(
            np.linalg.norm((guide_params["loc"] - mean) / spread, axis=1),
            np.abs(np.log(scale / spread)).mean(axis=1),
        )

    return {
        "posterior": request.param,
        "vanilla": errors(global_elbo, 1),
        "aligned": errors(aligned_elbo, 1),
        "pairs": errors(aligned_elbo, 2),
    }


def standard_error(*found):
    """The standard error of a difference of two means over keys."""
    return math.sqrt(sum(errors.var() for errors in found) / RUNS)


@pytest.mark.nightly
@shared_errors
@pytest.mark.parametrize("kind", ["aligned", "pairs"])
def test_at_epsilon_one_aligned_gradients_come_nearer_in_scale(errors_at_epsilon_one, kind):
    aligned, vanilla = errors_at_epsilon_one[kind], errors_at_epsilon_one["vanilla"]
    share = {"narrow": 0.7, "wide": 0.9}[errors_at_epsilon_one["posterior"]]
    assert aligned.scale.mean() < share * vanilla.scale.mean()


@pytest.mark.nightly
@shared_errors
@pytest.mark.parametrize("kind", ["aligned", "pairs"])
def test_at_epsilon_one_aligned_gradients_lose_no_more_in_mean_than_sampling_error(
    errors_at_epsilon_one, kind
):
    aligned, vanilla = errors_at_epsilon_one[kind].mean, errors_at_epsilon_one["vanilla"].mean
    assert aligned.mean() - vanilla.mean() < 4.5 * standard_error(aligned, vanilla)


@pytest.mark.nightly
@shared_errors
@pytest.mark.parametrize(
    ("errors_at_epsilon_one", "kind"),
    [
        ("wide", "aligned"),
        ("wide", "pairs"),
        pytest.param(
            "narrow",
            "aligned",
            marks=pytest.mark.xfail(
                # Over forty keys the difference is within its standard error.
                strict=False,
                reason="over 200 keys .048 against .045: if the posterior is narrow, the "
                "gradient of the scale hardly counts in the clip, and a batch shares one draw",
            ),
        ),
    ],
    indirect=["errors_at_epsilon_one"],
)
def test_at_epsilon_one_aligned_gradients_come_nearer_in_mean(errors_at_epsilon_one, kind):
    aligned, vanilla = errors_at_epsilon_one[kind], errors_at_epsilon_one["vanilla"]
    assert aligned.mean.mean() < vanilla.mean.mean()


@pytest.mark.nightly
@shared_errors
def test_at_epsilon_one_pairs_of_draws_come_nearer_in_scale_than_one(errors_at_epsilon_one):
    assert (
        errors_at_epsilon_one["pairs"].scale.mean()
        < 0.7 * errors_at_epsilon_one["aligned"].scale.mean()
    )


@pytest.mark.slow
def test_a_parameter_without_uncertainty_is_trained_next_to_latents(regression):
    """The scale of the noise is a Point, next to the weights."""
    x, y = regression.data

    def likelihood(latents, example):
        scale = jnp.exp(latents["log_scale"])
        away = example[1] - example[0] @ latents["weights"]
        return -0.5 * (away / scale) ** 2 - latents["log_scale"]

    guide = guides.Joint(
        {"weights": guides.MeanField(jnp.zeros(D)), "log_scale": guides.Point(jnp.zeros(()))}
    )
    guide_params = fit(global_elbo(guide, likelihood, num_examples=N), (x, y), steps=3000, rate=0.1)
    latents = guide.apply({"params": guide_params}, jax.random.key(0))
    residual = np.std(np.asarray(y - x @ regression.mean, float))
    assert abs(float(jnp.exp(latents["log_scale"])) / residual - 1) < 0.03


def test_wrong_arguments_are_refused():
    guide = guides.MeanField(jnp.zeros(D))
    with pytest.raises(TypeError, match=r"log_likelihood must take \(latents, example\)"):
        global_elbo(guide, lambda latents: 0.0, num_examples=N)
    with pytest.raises(ValueError, match="prior must be positive"):
        aligned_elbo(guide, log_likelihood, -1.0, num_examples=N)
    elbo = aligned_elbo(guide, log_likelihood, num_examples=N)
    with pytest.raises(KeyError, match="holds no draw for aligned gradients"):
        elbo.gradient_point(start(guide), optax.sgd(1.0).init(start(guide)))
    tx = elbo.wrap(optax.identity(), jax.random.key(0))
    with pytest.raises(ValueError, match=r"call tx\.update"):
        tx.update(jnp.zeros((1, D)), tx.init(start(guide)))
