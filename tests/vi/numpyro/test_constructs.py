"""Each line of the tables in docs/numpyro.md: accepted as NumPyro means it, or refused."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro_constructs as constructs
import pytest
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.infer import Trace_ELBO, autoguide, init_to_value
from numpyro_constructs import COUNTS, GUIDES, MODELS, N, X, Y

from dpoptax.vi.numpyro import DPSVI, _check_data, _checks, numpyro_elbo

PAGE = pathlib.Path(__file__).parents[3] / "docs/numpyro.md"
CASES = {**MODELS, **GUIDES}
# The others run less often: they share their code with these.
SLOW = {
    *('`plate("data", N)`', '`plate("data", N, subsample_size=B) as idx`', "data by keyword"),
    *("labels of shape (N, 1)", "counts as floats", "`handlers.scale`", "`AutoNormal`"),
    *("latents as many as examples, outside of the plate", "random walks over rows"),
    *("discrete latents", "data that the model closes over", "a joint density of all examples"),
}
QUICK = {"`AutoLaplaceApproximation`", "`AutoDAIS`", "random walks over rows"}


@pytest.fixture(autouse=True)
def _standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # NumPyro mixes integers and floats
        yield


def test_each_line_of_the_page_is_a_case_and_each_autoguide_has_a_line():
    rows = re.findall(r"^\| (.+?) \| (yes|no) \|", PAGE.read_text(), flags=re.MULTILINE)
    assert dict(rows) == {name: "no" if case.message else "yes" for name, case in CASES.items()}
    assert len(rows) == len(dict(rows))
    abstract = {"AutoContinuous", "AutoGuide"}
    assert {name.strip("`") for name in GUIDES} == {*autoguide.__all__} - abstract


def test_a_list_with_a_guide_that_is_refused_is_refused():
    model = constructs.of(constructs.logistic)
    guides = autoguide.AutoGuideList(model)
    guides.append(autoguide.AutoLaplaceApproximation(model))
    with pytest.raises(ValueError, match="AutoLaplaceApproximation computes its posterior"):
        numpyro_elbo(
            model, handlers.scale(guides, 0.5), X, Y, num_examples=N, init_key=jax.random.key(0)
        )


def elbo_and_guide(case):
    make = autoguide.AutoDelta if case.guide is None else case.guide
    is_guide = make in (constructs.encoder, constructs.guide_of_loc, constructs.guide_from_data)
    guide = make if is_guide else make(case.model)
    elbo = numpyro_elbo(
        case.model, guide, *case.args, num_examples=N, init_key=jax.random.key(0), **case.kwargs
    )
    return elbo, guide


def tiers(name):
    return () if name in QUICK else pytest.mark.slow if name in SLOW else pytest.mark.nightly


ACCEPTED = [pytest.param(c, id=n, marks=tiers(n)) for n, c in CASES.items() if not c.message]
REFUSED = [pytest.param(c, id=n, marks=tiers(n)) for n, c in CASES.items() if c.message]


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_become_another_model_is_refused(case):
    with pytest.raises(ValueError, match=case.message):
        elbo_and_guide(case)


@pytest.mark.parametrize("case", ACCEPTED)
def test_loss_and_gradient_are_those_of_numpyro(case):
    elbo, guide = elbo_and_guide(case)
    data = elbo.data(case.args, {k: v for k, v in case.kwargs.items() if np.ndim(v)})
    elbo.check_data(data)
    key = jax.random.key(1)
    draws = 1 if case.guide in (None, constructs.encoder) else 300
    keys = jax.random.split(key, draws)

    def ours(params, key):
        losses = jax.vmap(elbo.loss, (None, 0, None))(params, data, key)
        return elbo.scale * (jnp.sum(losses) + elbo.kl(params, key))

    def theirs(params, key):
        loss = Trace_ELBO().loss
        model = case.model if case.reference is None else case.reference
        return loss(key, elbo.constrain(params), model, guide, *case.args, **case.kwargs)

    def mean_and_gradient(function):
        def averaged(params):
            return jnp.mean(jax.vmap(function, (None, 0))(params, keys))

        return jax.jit(jax.value_and_grad(averaged))(elbo.init())

    (loss, gradient), (expected, expected_gradient) = map(mean_and_gradient, (ours, theirs))
    if draws == 1:
        np.testing.assert_allclose(loss, expected, rtol=1e-4)
    for leaf, other in zip(*map(jax.tree.leaves, (gradient, expected_gradient)), strict=True):
        if draws == 1:
            np.testing.assert_allclose(leaf, other, rtol=2e-3, atol=1e-4)
        else:  # other draws of the same latents
            assert np.all(np.isfinite(leaf))
    if draws > 1:
        assert abs(loss - expected) < 0.2 * abs(expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("likelihood", "y"),
    [
        (lambda z: dist.Binomial(5, logits=z), COUNTS),
        (lambda z: dist.Multinomial(5, logits=constructs.three(z)), jnp.eye(3)[Y] * 5),
        (lambda z: dist.DiscreteUniform(1, 5), Y + 1),
    ],
    ids=["binomial", "multinomial", "whole numbers above 0"],
)
def test_an_autoguide_starts_inside_of_the_support(likelihood, y):
    model = constructs.of(likelihood)
    elbo = numpyro_elbo(
        model, autoguide.AutoNormal(model), X, y, num_examples=N, init_key=jax.random.key(0)
    )
    elbo.check_data((X, y))


BAD_DATA = {
    "nan": (X.at[1, 0].set(jnp.nan), Y, "NaN or infinity.*site 'y' or its gradient"),
    "infinity": (X.at[1, 0].set(jnp.inf), Y, "NaN or infinity.*site 'y' or its gradient"),
    "labels 1 and 2": (X, Y + 1, "'y' lie outside the support.*takes 0 or 1"),
    "fractions": (X, Y + 0.25, "'y' lie outside the support.*takes 0 or 1"),
}


@pytest.mark.slow
def test_data_that_the_density_cannot_take_are_refused():
    model = constructs.of(constructs.logistic)
    elbo = numpyro_elbo(
        model, autoguide.AutoDelta(model), X, Y, num_examples=N, init_key=jax.random.key(0)
    )
    elbo.check_data((X, Y))
    for x, y, message in BAD_DATA.values():
        with pytest.raises(ValueError, match=message):
            elbo.check_data((x, y))
    mean = init_to_value(values={"w": X.mean(0)})
    guide = autoguide.AutoDelta(model, init_loc_fn=mean)
    svi = DPSVI(
        model, guide, numpyro.optim.Adam(0.1), Trace_ELBO(), clipping_threshold=1.0, dp_scale=1.0,
        num_obs_total=N,
    )  # fmt: skip
    with pytest.raises(ValueError, match="'w_auto_loc' starts at a statistic of the data"):
        svi.init(jax.random.key(0), X, Y)


def columns_model(likelihood):
    def model(column, y):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", N, subsample_size=len(y)):
            numpyro.sample("y", likelihood(w, column), obs=y)

    return model


COLUMNS = {
    "exposures": (lambda w, n: dist.Poisson(n * jnp.exp(w)), Y + 1, COUNTS),
    "total counts": (lambda w, n: dist.Binomial(n, logits=w), COUNTS + 1, COUNTS),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", COLUMNS.values(), ids=COLUMNS)
def test_columns_that_may_not_be_0_or_a_half_start_at_1(case):
    likelihood, column, y = case
    model = columns_model(likelihood)
    elbo = numpyro_elbo(
        model, autoguide.AutoDelta(model), column, y, num_examples=N, init_key=jax.random.key(0)
    )
    assert elbo.example[0] == 1
    elbo.check_data((column, y))


SERIES = {
    "a lag": (
        lambda w, x: dist.Normal(w + jnp.concatenate([jnp.zeros(1), x[:-1]]), 1.0),
        "couples",
    ),
    "the length": (lambda w, x: dist.Normal(w, 1 / jnp.sqrt(len(x))), "depends on the number of"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SERIES.values(), ids=SERIES)
def test_earlier_rows_and_the_length_of_the_batch_are_seen_within_the_plate(case):
    likelihood, message = case
    model = columns_model(likelihood)
    with pytest.raises(ValueError, match=message):
        numpyro_elbo(
            model, autoguide.AutoDelta(model), COUNTS, COUNTS, num_examples=N,
            init_key=jax.random.key(0),
        )  # fmt: skip


@pytest.mark.slow
def test_weights_of_a_guide_do_not_count_as_data():
    model = constructs.of(constructs.logistic)
    guide = autoguide.AutoIAFNormal(model)
    assert numpyro_elbo(model, guide, X, Y, num_examples=N, init_key=jax.random.key(0)).init()


@pytest.mark.slow
def test_a_finite_column_whose_transform_is_not_finite_is_refused():
    model = columns_model(lambda w, x: dist.Normal(w + jnp.log(x), 1.0))
    elbo = numpyro_elbo(
        model, autoguide.AutoDelta(model), COUNTS, COUNTS, num_examples=N,
        init_key=jax.random.key(0),
    )  # fmt: skip
    elbo.check_data((COUNTS + 1, COUNTS))
    with pytest.raises(ValueError, match="'y' is not finite for some rows"):
        elbo.check_data((COUNTS, COUNTS))  # the logarithm of 0


def test_statistics_are_found_among_other_latents_and_as_logarithms():
    column, constants = np.asarray(X), jnp.asarray([0.7, 0.1])
    for name, value in {
        "mean in a vector": jnp.concatenate([constants, X.mean(0)]),
        "logarithm of a spread": jnp.log(X[:, 0].std()),
    }.items():
        parts = [column] if name == "mean in a vector" else [column[:, 0]]
        with pytest.raises(ValueError, match="'loc' starts at a statistic"):
            _check_data._check_initial_values({"loc": value}, parts)
    _check_data._check_initial_values({"loc": constants}, [column])


def test_a_density_that_becomes_finite_is_a_change():
    """Equal examples have a spread of 0, so only different ones have a density."""
    nan, finite = jnp.asarray(jnp.nan), jnp.asarray(1.0)
    with pytest.raises(ValueError, match="'y' couples examples"):
        _checks._refuse_change("y", nan, finite, is_local=True)
    _checks._refuse_change("y", nan, nan, is_local=True)


@pytest.mark.slow
def test_a_common_scale_leaves_the_step_as_it_is_and_scales_the_loss():
    def step_and_loss(wrap):
        model, guide = constructs.local, constructs.encoder
        svi = DPSVI(
            wrap(model), wrap(guide), numpyro.optim.SGD(1.0), Trace_ELBO(),
            clipping_threshold=1.0, dp_scale=0.0, num_obs_total=N,
        )  # fmt: skip
        state = svi.init(jax.random.key(0), X[:, 0])
        after, loss = svi.update(state, X[:, 0])
        return after.params["slope"] - state.params["slope"], loss

    plain, loss = step_and_loss(lambda function: function)
    scaled, scaled_loss = step_and_loss(lambda function: handlers.scale(function, 1 / 64))
    assert plain != 0
    np.testing.assert_allclose(scaled, plain, rtol=1e-4)
    np.testing.assert_allclose(scaled_loss, loss / 64, rtol=1e-4)


@pytest.mark.untyped
def test_arguments_that_are_no_numbers_are_refused_without_their_values():
    model = constructs.of(constructs.logistic)
    with pytest.raises(TypeError, match=r"args\[1\]") as refused:
        numpyro_elbo(
            model, autoguide.AutoDelta(model), X, np.array(["secret"] * N), num_examples=N,
            init_key=jax.random.key(0),
        )  # fmt: skip
    assert "secret" not in str(refused.value)
    for option in ("rng_suite", "clip_unscaled_observations"):
        with pytest.raises(TypeError, match=f"no argument '{option}', an option of d3p"):
            DPSVI(
                model, model, numpyro.optim.Adam(0.1), Trace_ELBO(), clipping_threshold=1.0,
                dp_scale=1.0, num_obs_total=N, **{option: True},
            )  # fmt: skip
