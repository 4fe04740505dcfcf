"""Predictive: the draws of NumPyro's class, for guides of both libraries, and never the data."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import infer
from numpyro.handlers import seed
from numpyro.infer import autoguide

from dpoptax.vi import guides
from dpoptax.vi.numpyro import Predictive

N = 50


@pytest.fixture(autouse=True)
def _standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # NumPyro mixes integers and floats
        yield


PLATES = {
    "size of the batch": lambda x: numpyro.plate("data", len(x)),
    "part of N": lambda x: numpyro.plate("data", N, subsample_size=len(x)),
    "N": lambda x: numpyro.plate("data", N),
    "batch of the model": lambda x: numpyro.plate("data", N, subsample_size=10),
}


def model_of(plate):
    def model(x, y=None):
        slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
        with plate(x):
            noise = numpyro.sample("noise", dist.Normal(0.0, 0.1))
            numpyro.factor("weight", -(slope**2) * x)
            numpyro.sample("y", dist.Normal(slope * x + noise, 0.01), obs=y)

    return model


@pytest.mark.seconds
@pytest.mark.parametrize("name", PLATES)
@pytest.mark.parametrize("rows", [7, 3 * N])
def test_the_plate_over_the_data_takes_any_number_of_rows(name, rows):
    predictive = Predictive(model_of(PLATES[name]), num_samples=5, data_plate="data")
    x = jnp.full(rows, 2.0)
    draws = predictive(jax.random.key(0), x, jnp.full(rows, 77.0))
    assert draws["noise"].shape == draws["y"].shape == (5, rows)
    residual = draws["y"] - 2 * draws["slope"][:, None] - draws["noise"]
    np.testing.assert_allclose(residual.std(), 0.01, rtol=0.5)


def test_a_plate_of_fixed_size_is_named_in_the_error():
    predictive = Predictive(model_of(PLATES["N"]), num_samples=5)
    with pytest.raises(ValueError, match="shapes") as caught:
        predictive(jax.random.key(0), jnp.ones(7))
    assert "data_plate='its name'" in "".join(caught.value.__notes__)
    with pytest.raises(ValueError, match="no argument is an array"):
        Predictive(lambda: None, num_samples=5, data_plate="data")(jax.random.key(0))


@pytest.mark.seconds
def test_calls_are_those_of_numpyro():
    model = model_of(PLATES["size of the batch"])
    x = jnp.ones(7)
    posterior = {"slope": jnp.linspace(0.0, 1.0, 5)}
    for options in ({"num_samples": 5}, {"posterior_samples": posterior, "return_sites": ("y",)}):
        ours = Predictive(model, **options)(jax.random.key(1), x)
        theirs = infer.Predictive(model, **options)(jax.random.key(1), x)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    positional = Predictive(model, posterior, parallel=True)(jax.random.key(1), x, None)
    assert set(positional) == {"noise", "y", "weight"}
    with pytest.raises(ValueError, match="num_samples"):
        Predictive(model)


def test_observations_are_ignored_where_numpyro_returns_them():
    model = model_of(PLATES["size of the batch"])
    x, y = jnp.ones(7), jnp.full(7, 77.0)
    posterior = {"slope": jnp.zeros(5)}
    leaked = infer.Predictive(model, posterior, return_sites=("y",))(jax.random.key(0), x, y)
    assert np.all(leaked["y"] == 77.0)
    ours = Predictive(model, posterior, return_sites=("y",))
    with_data, without = (ours(jax.random.key(0), x, value) for value in (y, None))
    assert np.abs(with_data["y"]).max() < 1
    np.testing.assert_array_equal(with_data["y"], without["y"])


def regression(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", N, subsample_size=len(x)):
        numpyro.sample("y", dist.Normal(slope * x, 0.01), obs=y)


@pytest.mark.seconds
def test_guides_of_both_libraries_give_one_posterior_predictive():
    loc, stddev = 0.7, 0.2
    ours = guides.MeanField({"slope": jnp.zeros(())})
    params = {
        "loc": {"slope": jnp.array(loc)},
        "raw_scale": jnp.log(jnp.expm1(jnp.full(1, stddev))),
    }
    theirs = autoguide.AutoNormal(regression)
    with pytest.raises(ValueError, match="has not been trained"):
        Predictive(regression, guide=theirs, params={}, num_samples=2)
    seed(theirs, 0)(jnp.ones(3), jnp.ones(3))
    values = {"slope_auto_loc": jnp.array(loc), "slope_auto_scale": jnp.array(stddev)}
    x, draws = jnp.full(3, 2.0), 4000
    for guide, trained in ((ours, params), (theirs, values)):
        predictive = Predictive(regression, guide=guide, params=trained, num_samples=draws)
        found = predictive(jax.random.key(0), x)
        y = np.asarray(found["y"][:, 0])
        # Five standard errors, of the mean and of the deviation.
        assert abs(y.mean() - 2 * loc) < 5 * 2 * stddev / np.sqrt(draws)
        assert abs(y.std() - 2 * stddev) < 5 * 2 * stddev / np.sqrt(2 * draws)
        assert found["y"].shape == (draws, 3)


@pytest.mark.untyped
def test_guides_without_names_or_parameters_are_refused():
    guide = guides.MeanField({"slope": jnp.zeros(())})
    with pytest.raises(TypeError, match="needs params and num_samples"):
        Predictive(regression, guide=guide)
    unnamed = guides.MeanField(jnp.zeros(()))
    params = {"loc": jnp.array(0.0), "raw_scale": jnp.zeros(1)}
    predictive = Predictive(regression, guide=unnamed, params=params, num_samples=2)
    with pytest.raises(TypeError, match="expected a dictionary by name"):
        predictive(jax.random.key(0), jnp.ones(3))
    with pytest.raises(TypeError, match="typed"):
        Predictive(regression, num_samples=2)(jax.random.PRNGKey(0), jnp.ones(3))
