"""DPSVI and numpyro_elbo: equal to NumPyro's SVI without clip and noise; what they refuse."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.contrib.module import flax_module
from numpyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO, autoguide
from numpyro.infer.elbo import RenyiELBO

import dpoptax
from dpoptax.samplers import MaskedExamples
from dpoptax.vi.numpyro import DPSVI, numpyro_elbo

N, D = 300, 3
HUGE = 1e9  # a clip that clips nothing


@pytest.fixture(autouse=True)
def _standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # NumPyro mixes integers and floats
        yield


def regression(x, y=None, *, prior_scale=1.0):
    weights = numpyro.sample("weights", dist.Normal(0.0, prior_scale).expand([D]).to_event(1))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("data", N, subsample_size=len(x)):
        numpyro.sample("y", dist.Normal(x @ weights, scale), obs=y)


@pytest.fixture(scope="module")
def data():
    x_key, y_key = jax.random.split(jax.random.key(0))
    x = jax.random.normal(x_key, (N, D))
    return x, x @ jnp.array([1.0, -2.0, 0.5]) + 0.5 * jax.random.normal(y_key, (N,))


def elbo_of(model, guide, *args, **options):
    options = {"num_examples": N, "init_key": jax.random.key(0)} | options
    return numpyro_elbo(model, guide, *args, **options)


def svi_of(model, guide, optim=None, loss=None, **options):
    options = {"clipping_threshold": HUGE, "dp_scale": 0.0, "num_obs_total": N} | options
    optim = numpyro.optim.Adam(0.02) if optim is None else optim
    return DPSVI(model, guide, optim, Trace_ELBO() if loss is None else loss, **options)


@pytest.mark.slow
@pytest.mark.parametrize("kl", ["after_noise", "clipped"])
def test_without_clip_and_noise_an_update_has_the_gradient_of_numpyro(kl, data):
    """AutoDelta draws nothing, so the two can be compared number by number."""
    guide = autoguide.AutoDelta(regression)
    svi = svi_of(regression, guide, optax.sgd(1.0), kl=kl)
    state = svi.init(dpoptax.random.insecure_key(0), *data)
    after, loss = jax.jit(svi.update)(state, *data)
    theirs = SVI(regression, guide, numpyro.optim.Adam(1.0), Trace_ELBO())
    theirs.init(jax.random.key(1), *data)

    def negative_elbo(params):
        values = theirs.constrain_fn(params)
        return Trace_ELBO().loss(jax.random.key(2), values, regression, guide, *data)

    expected, gradient = jax.value_and_grad(negative_elbo)(state.params)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    for name, leaf in gradient.items():
        found = state.params[name] - after.params[name]
        np.testing.assert_allclose(found, leaf / N, rtol=2e-3, atol=1e-5)


GUIDES = {
    "normal": (autoguide.AutoNormal, Trace_ELBO(num_particles=2)),
    "normal, closed form": (autoguide.AutoNormal, TraceMeanField_ELBO()),
    "delta": (autoguide.AutoDelta, Trace_ELBO()),
    "multivariate": (autoguide.AutoMultivariateNormal, Trace_ELBO()),
    "low rank": (autoguide.AutoLowRankMultivariateNormal, Trace_ELBO()),
}


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize(("make", "loss"), GUIDES.values(), ids=GUIDES)
def test_autoguides_reach_what_numpyro_reaches_and_predictive_works(make, loss, data):
    guide = make(regression)
    sampler = dpoptax.samplers.Poisson(N, N)
    optim = numpyro.optim.Adam(0.03, b2=0.98)
    result = svi_of(regression, guide, optim, loss).run(
        dpoptax.random.insecure_key(0), 1000, *data, sampler=sampler, progress_bar=False
    )
    samples = Predictive(guide, params=result.params, num_samples=2000)(jax.random.key(1), *data)
    x, y = (np.asarray(part, float) for part in data)
    least_squares = np.linalg.lstsq(x, y, rcond=None)[0]
    assert np.abs(samples["weights"].mean(0) - least_squares).max() < 0.03
    assert abs(float(samples["scale"].mean()) - np.std(y - x @ least_squares)) < 0.03
    if make is not autoguide.AutoDelta:
        expected = 0.5 / math.sqrt(N)
        assert np.abs(np.log(samples["weights"].std(0) / expected)).max() < 0.5
    predicted = Predictive(regression, samples)(jax.random.key(2), x[:7])
    assert predicted["y"].shape == (2000, 7)


@pytest.mark.slow
def test_a_private_run_knows_what_it_cost(data):
    svi = svi_of(regression, autoguide.AutoNormal(regression), clipping_threshold=1.0,
                 dp_scale=2.0)  # fmt: skip
    # With the padded size that a plan chooses, which the run has too.
    sampler = dpoptax.Plan(sampler=dpoptax.samplers.Poisson(N, 30), clip=1.0, noise_multiplier=2.0,
                           num_steps=200, delta=1e-4).sampler  # fmt: skip
    result = svi.run(dpoptax.random.insecure_key(0), 200, *data, sampler=sampler, delta=1e-4,
                     progress_bar=False)  # fmt: skip
    expected = dpoptax.accounting.epsilon(
        sampler=sampler, noise_multiplier=2.0, num_steps=200, delta=1e-4
    )
    assert result.report().epsilon == pytest.approx(expected)
    assert all(bool(jnp.isfinite(value).all()) for value in result.params.values())


@pytest.mark.slow
def test_updates_run_in_a_custom_loop_with_masks(data):
    svi = svi_of(regression, autoguide.AutoNormal(regression), clipping_threshold=1.0,
                 dp_scale=1.0, expected_batch_size=50)  # fmt: skip
    sampler = dpoptax.samplers.Poisson(N, 50)
    root = dpoptax.random.insecure_key(0)
    state = svi.init(root, *data)

    @jax.jit
    def run(state, sampler_state):
        def step(carry, _):
            state, sampler_state = carry
            sampler_state, batch = sampler.sample(sampler_state)
            state, loss = svi.update(state, *dpoptax.samplers.take(data, batch))
            return (state, sampler_state), loss

        return jax.lax.scan(step, (state, sampler_state), length=100)

    keys = dpoptax.random.split_by_purpose(dpoptax.random.insecure_key(1))
    (after, _), losses = run(state, sampler.init(keys.sampling_key))
    assert bool(jnp.isfinite(losses).all())
    assert int(after.step) == 100
    assert float(svi.evaluate(after, *data)) < float(svi.evaluate(state, *data))
    assert svi.get_params(after)["weights_auto_scale"].min() > 0


@pytest.mark.slow
def test_padding_adds_nothing(data):
    svi = svi_of(regression, autoguide.AutoDelta(regression), optax.sgd(1.0), expected_batch_size=9)
    state = svi.init(dpoptax.random.insecure_key(0), *data)
    x, y = (part[:9] for part in data)
    update = jax.jit(svi.update)
    alone, _ = update(state, x, y)
    padded = jnp.concatenate([x, jnp.full((4, D), jnp.nan)]), jnp.concatenate([y, jnp.ones(4)])
    together, loss = update(state, *padded, mask=jnp.arange(13) < 9)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), alone.params, together.params
    )
    assert bool(jnp.isfinite(loss))
    # The mask may also come with the examples, as `take` returns them.
    taken = MaskedExamples(padded, jnp.arange(13) < 9)
    for args in ((taken,), tuple(taken)):
        carried, same_loss = update(state, *args)
        jax.tree.map(np.testing.assert_array_equal, carried.params, together.params)
        assert same_loss == loss


@pytest.mark.slow
def test_latents_of_each_example_are_part_of_its_loss():
    """x = z + N(0, 1), z ~ N(0, 1): at the posterior, the bound is the evidence."""

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        slope = numpyro.param("slope", 0.5)
        scale = numpyro.param("scale", math.sqrt(0.5), constraint=dist.constraints.positive)
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(slope * x, scale))

    x = jnp.linspace(-2, 2, 5)
    for loss in (Trace_ELBO(), TraceMeanField_ELBO()):
        elbo = elbo_of(model, guide, x, num_examples=5, loss=loss)
        keys = jax.random.split(jax.random.key(0), (5, 4000))
        losses = jax.vmap(jax.vmap(elbo.loss, (None, None, 0)), (None, 0, 0))(
            elbo.init(), (x,), keys
        )
        evidence = -0.5 * x**2 / 2 - 0.5 * math.log(2 * math.pi * 2)
        error = np.abs(np.asarray(losses.mean(1) + evidence))
        assert np.all(error < 4.5 * np.asarray(losses.std(1)) / math.sqrt(4000) + 1e-5)
        assert float(elbo.kl(elbo.init(), jax.random.key(0))) == 0


@pytest.mark.slow
def test_one_objective_serves_fit_too(data):
    guide = autoguide.AutoNormal(regression)
    elbo = elbo_of(regression, guide, *data)
    plan = dpoptax.Plan(
        sampler=dpoptax.samplers.Poisson(N, 30), clip=1.0, noise_multiplier=1.0, num_steps=20,
        delta=1e-4,
    )  # fmt: skip
    result = dpoptax.training.fit(
        elbo,
        elbo.init(),
        data,
        plan=plan,
        optimizer=optax.adam(0.01),
        key=dpoptax.random.insecure_key(0),
        progress=False,
    )
    assert set(elbo.constrain(result.params)) == set(elbo.init())


@pytest.mark.slow
def test_initial_values_do_not_depend_on_data(data):
    guide = autoguide.AutoNormal(regression)
    first = elbo_of(regression, guide, *data).init()
    second = elbo_of(
        regression, autoguide.AutoNormal(regression), *jax.tree.map(lambda d: 7 - d, data)
    ).init()
    jax.tree.map(np.testing.assert_array_equal, first, second)


def no_plate(x, y=None):
    weights = numpyro.sample("weights", dist.Normal(0.0, 1.0).expand([D]).to_event(1))
    numpyro.sample("y", dist.Normal(x @ weights, 1.0).to_event(1), obs=y)


def wrong_size(x, y=None):
    weights = numpyro.sample("weights", dist.Normal(0.0, 1.0).expand([D]).to_event(1))
    with numpyro.plate("data", 77, subsample_size=len(x)):
        numpyro.sample("y", dist.Normal(x @ weights, 1.0), obs=y)


def coupled(x, y=None):
    weights = numpyro.sample("weights", dist.Normal(0.0, 1.0).expand([D]).to_event(1))
    with numpyro.plate("data", N, subsample_size=len(x)):
        numpyro.sample("y", dist.Normal((x - x.mean(0)) @ weights, 1.0), obs=y)


def prior_of_data(x, y=None):
    spread = 1 + jnp.abs(x).max()
    weights = numpyro.sample("weights", dist.Normal(0.0, spread).expand([D]).to_event(1))
    with numpyro.plate("data", N, subsample_size=len(x)):
        numpyro.sample("y", dist.Normal(x @ weights, 1.0), obs=y)


def discrete(x, y=None):
    weights = numpyro.sample("weights", dist.Normal(0.0, 1.0).expand([D]).to_event(1))
    with numpyro.plate("data", N, subsample_size=len(x)):
        group = numpyro.sample("group", dist.Bernoulli(0.5))
        numpyro.sample("y", dist.Normal(x @ weights + group, 1.0), obs=y)


def guide_of_discrete(x, y=None):
    loc = numpyro.param("loc", jnp.zeros(D))
    numpyro.sample("weights", dist.Normal(loc, 1.0).to_event(1))
    with numpyro.plate("data", N, subsample_size=len(x)):
        numpyro.sample("group", dist.Bernoulli(0.5))


def coupled_counts(x, y=None):
    del x
    rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
    with numpyro.plate("data", N, subsample_size=len(y)):
        numpyro.sample("y", dist.Poisson(rate * (1 + y.mean())), obs=y)


REFUSED = {
    "no plate": (no_plate, None, r"observed site 'y' lies in no plate over the data.*plate\('data"),
    "size": (wrong_size, None, r"site 'y'.*\['data'\] of size\(s\) \[77\]; expected one, of size"),
    "coupled": (coupled, None, "site 'y' couples examples"),
    "prior": (prior_of_data, None, "site 'weights' lies in no plate.*depends on the data"),
    "discrete": (discrete, guide_of_discrete, "site 'group' is a discrete latent.*MixtureSame"),
    "sites": (regression, guide_of_discrete, r"it lacks \['scale'\] and has \['group'\] too many"),
}


# Those that trace the whole objective before they are refused take long.
LONG = ("size", "coupled")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        pytest.param(*case, id=name, marks=pytest.mark.slow if name in LONG else ())
        for name, case in REFUSED.items()
    ],
)
def test_what_has_no_private_gradient_is_refused_by_the_name_of_its_site(
    model, guide, message, data
):
    guide = autoguide.AutoNormal(model) if guide is None else guide
    with pytest.raises(ValueError, match=message):
        elbo_of(model, guide, *data)


@pytest.mark.slow
def test_integer_data_that_couple_examples_are_refused():
    guide = autoguide.AutoNormal(coupled_counts)
    with pytest.raises(ValueError, match="site 'y' couples examples"):
        elbo_of(coupled_counts, guide, jnp.ones(N), jnp.ones(N, jnp.int32))


LIKELIHOODS = {
    "log-normal": lambda loc: dist.LogNormal(loc, 1.0),
    "gamma": lambda loc: dist.Gamma(3.0, jnp.exp(loc)),
    "beta": lambda loc: dist.Beta(2.0, 1 + jnp.exp(loc)),
    "counts": lambda loc: dist.Poisson(jnp.exp(loc)),
    "two columns": lambda loc: dist.Normal(loc, 1.0),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "two columns" else pytest.mark.nightly)
        for name in LIKELIHOODS
    ],
)
def test_a_fresh_autoguide_serves_any_support_and_a_second_plate_of_two(name):
    def model(y):
        loc = numpyro.sample("loc", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", N, subsample_size=len(y), dim=-2), numpyro.plate("out", 2):
            numpyro.sample("y", LIKELIHOODS[name](loc), obs=y)

    y = jnp.full((N, 2), 3 if name == "counts" else 0.3)
    guide = autoguide.AutoNormal(model)
    svi = svi_of(model, guide, clipping_threshold=1.0, dp_scale=1.0)
    sampler = dpoptax.samplers.Poisson(N, 30)
    result = svi.run(jax.random.key(0), 3, y, sampler=sampler, progress_bar=False)
    assert all(bool(jnp.isfinite(value).all()) for value in result.params.values())


@pytest.mark.slow
def test_local_latents_need_a_custom_guide():
    def model(x):
        with numpyro.plate("data", N, subsample_size=len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="a guide that computes them from the example"):
        elbo_of(model, autoguide.AutoNormal(model), jnp.ones(N))


@pytest.mark.slow
def test_nan_in_the_data_is_refused_unless_the_model_masks_it(data):
    x, y = data
    holes = y.at[5].set(jnp.nan)
    sampler = dpoptax.samplers.Poisson(N, 30)
    svi = svi_of(regression, autoguide.AutoNormal(regression))
    with pytest.raises(ValueError, match=r"density of site 'y' or its.*handlers\.mask"):
        svi.run(jax.random.key(0), 2, x, holes, sampler=sampler, progress_bar=False)

    def masked(x, y):
        weights = numpyro.sample("weights", dist.Normal(0.0, 1.0).expand([D]).to_event(1))
        observed = ~jnp.isnan(y)
        with numpyro.plate("data", N, subsample_size=len(x)), numpyro.handlers.mask(mask=observed):
            numpyro.sample("y", dist.Normal(x @ weights, 1.0), obs=jnp.where(observed, y, 0.0))

    svi = svi_of(masked, autoguide.AutoNormal(masked))
    two = x.at[5, 0].set(jnp.nan).at[8, 1].set(jnp.nan)  # the model masks the first of them
    with pytest.raises(ValueError, match="density of site 'y' or its gradient is not finite"):
        svi.run(jax.random.key(0), 2, two, holes, sampler=sampler, progress_bar=False)
    result = svi.run(jax.random.key(0), 2, x, holes, sampler=sampler, progress_bar=False)
    assert all(bool(jnp.isfinite(value).all()) for value in result.params.values())


@pytest.mark.slow
def test_other_mistakes_are_refused(data):
    guide = autoguide.AutoNormal(regression)
    with pytest.raises(TypeError, match=r"Trace_ELBO or TraceMeanField_ELBO.*got RenyiELBO"):
        svi_of(regression, guide, loss=RenyiELBO()).init(jax.random.key(0), *data)
    with pytest.raises(TypeError, match="optim must be an optimizer"):
        svi_of(regression, guide, optim=0.1)
    svi = svi_of(regression, guide)
    state = svi.init(jax.random.key(0), *data)
    with pytest.raises(RuntimeError, match="call init"):
        svi_of(regression, guide).update(state, *data)
    with pytest.raises(ValueError, match="expected_batch_size"):
        svi.update(state, *data, mask=jnp.ones(N, bool))
    with pytest.raises(ValueError, match="clipping_threshold must be positive"):
        svi_of(regression, guide, clipping_threshold=0.0)


@pytest.mark.slow
def test_a_batch_with_an_unexpected_length_is_refused(data):
    svi = svi_of(regression, autoguide.AutoNormal(regression), clipping_threshold=1.0, dp_scale=1.0)
    state = svi.init(dpoptax.random.insecure_key(0), *data)
    part = jax.tree.map(lambda leaf: leaf[:50], data)
    with pytest.raises(ValueError, match=r"a batch of 300.* got one of 50\. Pass DPSVI"):
        svi.update(state, *part)


@pytest.mark.slow
def test_a_vae_of_flax_modules_is_trained_as_its_script_is_written():
    """Local latents, an encoder and a decoder registered by `flax_module`: trees of parameters."""
    images = (jax.random.uniform(jax.random.key(0), (64, 12)) < 0.5).astype(jnp.float32)
    images = images * (jnp.arange(12) < 6)  # one half is dark

    def model(x):
        decode = flax_module("decoder", nn.Dense(12), input_shape=(2,))
        with numpyro.plate("data", 64, subsample_size=len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=decode(z)).to_event(1), obs=x)

    def guide(x):
        encode = flax_module("encoder", nn.Dense(4), input_shape=(12,))
        with numpyro.plate("data", 64, subsample_size=len(x)):
            loc, log_scale = jnp.split(encode(x), 2, axis=-1)
            numpyro.sample("z", dist.Normal(loc, jnp.exp(log_scale)).to_event(1))

    svi = DPSVI(
        model, guide, numpyro.optim.Adam(0.05), Trace_ELBO(), clipping_threshold=5.0,
        dp_scale=1.0, num_obs_total=64, expected_batch_size=32,
    )  # fmt: skip
    key = dpoptax.random.insecure_key(0)
    initial = svi.get_params(svi.init(key, images))
    sampler = dpoptax.samplers.Poisson(64, 32)
    result = svi.run(key, 150, images, sampler=sampler, delta=1e-3, progress_bar=False)
    assert set(result.params) == {"encoder$params", "decoder$params"}
    assert jax.tree.structure(result.params) == jax.tree.structure(initial)
    bias = result.params["decoder$params"]["bias"]
    assert bias[6:].mean() < bias[:6].mean() - 1  # dark pixels are dark
    assert math.isfinite(result.report().epsilon)
