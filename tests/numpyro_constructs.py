"""Models with the constructs of docs/numpyro.md, by the words of its tables."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import deterministic, handlers, plate, sample
from numpyro.contrib.module import flax_module
from numpyro.infer import autoguide
from numpyro.infer.reparam import LocScaleReparam

N, D = 6, 2
_RANDOM = np.random.default_rng(0)
X = jnp.asarray(_RANDOM.normal(size=(N, D)), jnp.float32)
Y = jnp.asarray([0, 1, 1, 0, 1, 0])
COUNTS = jnp.asarray([0.0, 2.0, 1.0, 5.0, 3.0, 1.0])
ROW = jnp.asarray([1.0, 0.5])


class Case(NamedTuple):
    """A model, its guide (None: AutoDelta), data, and what is refused.

    `reference` is the same model for NumPyro, if it needs another form of it.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...] = (X, Y)
    kwargs: Mapping[str, Any] = {}
    guide: Any = None
    message: str = ""
    reference: Callable[..., Any] | None = None


def weights(size=D):
    return sample("w", dist.Normal(0.0, 1.0).expand([size]).to_event(1))


def of(likelihood, **plate_options):
    """A model with one likelihood of the linear predictor."""

    def model(x, y=None):
        w = weights()
        with plate("data", N, subsample_size=len(x), **plate_options):
            sample("y", likelihood(x @ w), obs=y)

    return model


def logistic(logits):
    return dist.Bernoulli(logits=logits)


def three(logits):
    return jnp.stack([0 * logits, logits, -logits], -1)


def plate_of_batch(x, y):
    w = weights()
    with plate("data", len(x)):
        sample("y", logistic(x @ w), obs=y)


def plate_of_all(x, y):
    w = weights()
    with plate("data", N):
        sample("y", logistic(x @ w), obs=y)


def own_subsample(x, y):
    w = weights()
    with plate("data", N, subsample_size=3) as index:
        sample("y", logistic(x[index] @ w), obs=y[index])


def subsampled(x, y):
    w = weights()
    with plate("data", N, subsample_size=3):
        x, y = numpyro.subsample(x, event_dim=1), numpyro.subsample(y, event_dim=0)
        sample("y", logistic(x @ w), obs=y)


def two_plates(x):
    loc = sample("loc", dist.Normal(0.0, 1.0).expand([D]).to_event(1))
    with plate("data", N, subsample_size=len(x), dim=-2), plate("columns", D):
        sample("x", dist.Normal(loc, 1.0), obs=x)


def groups(x, y):
    w = weights()
    with plate("groups", 2):
        effect = sample("effect", dist.Normal(0.0, 1.0))
    with plate("data", N, subsample_size=len(x)):
        sample("y", dist.Normal(x @ w + effect[y], 1.0), obs=x[:, 0])


def factor_in_plate(x, y):
    w = weights()
    with plate("data", N, subsample_size=len(x)):
        numpyro.factor("y", y * (x @ w) - jnp.exp(x @ w))


def masked(x, y):
    w = weights()
    observed = ~jnp.isnan(x[:, 0])
    x = jnp.where(observed[:, None], x, 0.0)
    with plate("data", N, subsample_size=len(x)), handlers.mask(mask=observed):
        sample("y", logistic(x @ w), obs=y)


def reparam(x, y):
    with handlers.reparam(config={"w": LocScaleReparam(0.0)}):
        scale = sample("scale", dist.HalfNormal(1.0))
        w = sample("w", dist.Normal(jnp.zeros(D), scale).to_event(1))
    with plate("data", N, subsample_size=len(x)):
        sample("y", logistic(x @ w), obs=y)


def with_deterministic(x, y):
    w = weights()
    with plate("data", N, subsample_size=len(x)):
        sample("y", logistic(deterministic("logits", x @ w)), obs=y)


def improper(x, y):
    w = sample("w", dist.ImproperUniform(dist.constraints.real, (), (D,)))
    with plate("data", N, subsample_size=len(x)):
        sample("y", logistic(x @ w), obs=y)


def mixture(x):
    loc = sample("loc", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with plate("data", N, subsample_size=len(x)):
        shares = dist.Categorical(jnp.array([0.4, 0.6]))
        sample("x", dist.MixtureSameFamily(shares, dist.Normal(loc, 1.0)), obs=x)


def local(x):
    with plate("data", N, subsample_size=len(x)):
        z = sample("z", dist.Normal(0.0, 1.0))
        sample("x", dist.Normal(z, 1.0), obs=x)


def encoder(x):
    slope = numpyro.param("slope", 0.3)  # the gradient is zero at 0.5
    with plate("data", N, subsample_size=len(x)):
        sample("z", dist.Delta(slope * x))


def flax_regression(x, y):
    net = flax_module("net", nn.Dense(1), input_shape=(D,))
    scale = sample("scale", dist.HalfNormal(1.0))
    with plate("data", N, subsample_size=len(x)):
        sample("y", dist.Normal(net(x)[:, 0], scale), obs=y)


def hidden_group(x):
    loc = sample("loc", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with plate("data", N, subsample_size=len(x)):
        group = sample("group", dist.Categorical(jnp.ones(2) / 2))
        sample("x", dist.Normal(loc[group], 1.0), obs=x)


def guide_of_loc(x):
    del x
    sample("loc", dist.Normal(numpyro.param("start", jnp.zeros(2)), 1.0).to_event(1))


def no_plate(x, y):
    sample("y", logistic(x @ weights()), obs=y)


def to_event(x, y):
    sample("y", logistic(x @ weights()).to_event(1), obs=y)


def gaussian_process(x, y):
    scale = sample("scale", dist.HalfNormal(1.0))
    distances = jnp.sum((x[:, None] - x[None]) ** 2, -1)
    covariance = scale * jnp.exp(-distances) + 0.1 * jnp.eye(len(x))
    sample("y", dist.MultivariateNormal(jnp.zeros(len(x)), covariance), obs=y)


def effects_of_rows(x, y):
    w = weights()
    effect = sample("effect", dist.Normal(0.0, 1.0).expand([len(x)]).to_event(1))
    with plate("data", N, subsample_size=len(x)):
        sample("y", dist.Poisson(jnp.exp(x @ w + effect)), obs=y)


def volatility(x):
    walk = sample("walk", dist.GaussianRandomWalk(0.1, num_steps=len(x)))
    with plate("data", N, subsample_size=len(x)):
        sample("x", dist.Normal(0.0, jnp.exp(walk)), obs=x)


def closure(x):
    w = weights()
    with plate("data", N, subsample_size=len(x)) as index:
        sample("y", logistic(x @ w), obs=Y[index])


def standardised(x, y):
    w = weights()
    with plate("data", N, subsample_size=len(x)):
        sample("y", logistic((x - jnp.nanmean(x, axis=0)) @ w), obs=y)


def prior_of_data(x, y):
    w = sample("w", dist.Normal(x.mean(0), 1.0).to_event(1))
    with plate("data", N, subsample_size=len(x)):
        sample("y", logistic(x @ w), obs=y)


def prior_of_length(x, y):
    w = sample("w", dist.Normal(0.0, 1 / len(x)).expand([D]).to_event(1))
    with plate("data", N, subsample_size=len(x)):
        sample("y", logistic(x @ w), obs=y)


def guide_from_data(x, y):
    del y
    sample("w", dist.Normal(numpyro.param("loc", x.mean(0)), 1.0).to_event(1))


def column(x, y):
    w = sample("w", dist.Normal(0.0, 1.0).expand([D, 1]).to_event(2))
    with plate("data", N, subsample_size=len(x)):
        sample("y", logistic(x @ w), obs=y)


def factor_outside(x, y):
    numpyro.factor("y", jnp.sum(y * (x @ weights())))


def list_of_guides(model):
    guides = autoguide.AutoGuideList(model)
    guides.append(autoguide.AutoDelta(model))
    return guides


MODELS = {
    '`plate("data", N, subsample_size=len(x))`': Case(of(logistic)),
    '`plate("data", len(x))`': Case(plate_of_batch),
    '`plate("data", N)`': Case(plate_of_all),
    '`plate("data", N, subsample_size=B) as idx`': Case(own_subsample, reference=of(logistic)),
    "`numpyro.subsample`": Case(subsampled, reference=of(logistic)),
    "data by keyword": Case(of(logistic), (X,), {"y": Y}),
    "labels of shape (N, 1)": Case(
        of(logistic), (X, Y[:, None]), reference=lambda x, y: of(logistic)(x, y[:, 0])
    ),
    "labels as floats or booleans": Case(of(logistic), (X, Y.astype(float))),
    "counts as floats": Case(of(lambda z: dist.Poisson(jnp.exp(z))), (X, COUNTS)),
    "observations on a simplex": Case(
        of(lambda z: dist.Dirichlet(jnp.exp(three(z)))), (X, jnp.full((N, 3), 1 / 3))
    ),
    "a second plate around the data": Case(two_plates, (X,)),
    "groups with their own plate": Case(groups),
    "`numpyro.factor` in the plate": Case(factor_in_plate),
    "`handlers.mask`": Case(masked, (X.at[2, 0].set(jnp.nan), Y)),
    "`handlers.scale`": Case(handlers.scale(of(logistic), 1 / N)),
    "`handlers.reparam`": Case(reparam),
    "`numpyro.deterministic`": Case(with_deterministic),
    "improper priors": Case(improper),
    "mixtures summed over their components": Case(mixture, (X[:, 0],)),
    "latents of each example, with an encoder": Case(local, (X[:, 0],), guide=encoder),
    "modules of Flax": Case(flax_regression),
    "the argument `num_obs_total`": Case(
        lambda x, y, num_obs_total: of(logistic)(x, y), kwargs={"num_obs_total": N}
    ),
    "no plate over the data": Case(no_plate, message="in no plate.*Put it into numpyro.plate"),
    "`to_event` over the examples": Case(to_event, message="to_event joins the examples"),
    "a joint density of all examples": Case(
        gaussian_process, message="joint density of all examples, MultivariateNormal.*hsgp"
    ),
    "latents as many as examples, outside of the plate": Case(
        effects_of_rows, message="latent site 'effect' grows with the number of examples"
    ),
    "random walks over rows": Case(
        volatility, (X[:, 0],), message="latent site 'walk' grows.*whole series"
    ),
    "latents of each example, with an autoguide": Case(
        local, (X[:, 0],), message="one set of latents 'z'.*an encoder"
    ),
    "discrete latents": Case(
        hidden_group, (X[:, 0],), guide=guide_of_loc, message="'group' is a discrete latent"
    ),
    "data that the model closes over": Case(
        closure, (X,), message="'y' reads rows of an array by the indices of the plate 'data'"
    ),
    "statistics of the batch in the model": Case(standardised, message="'y' couples examples"),
    "priors that depend on data": Case(prior_of_data, message="'w' lies in no plate.*depends on"),
    "the length of the batch in a density": Case(
        prior_of_length, message="'w' depends on the number of examples"
    ),
    "parameters that start at data": Case(
        of(logistic), guide=guide_from_data, message="'loc' starts at a value that is computed"
    ),
    "a column (N, 1) against a row (N,)": Case(column, message=r"\(N, 1\) met one of shape"),
    "`factor` outside of the plate, of data": Case(factor_outside, message="'y' lies in no plate"),
}

GUIDES = {
    **{
        f"`{name}`": Case(of(logistic), guide=getattr(autoguide, name))
        for name in (
            *("AutoNormal", "AutoDiagonalNormal", "AutoMultivariateNormal"),
            *("AutoLowRankMultivariateNormal", "AutoDelta", "AutoIAFNormal", "AutoBNAFNormal"),
        )
    },
    "`AutoGuideList`": Case(of(logistic), guide=list_of_guides),
    "`AutoBatchedMultivariateNormal`": Case(
        groups, guide=lambda m: autoguide.AutoBatchedMultivariateNormal(m, batch_ndim=0)
    ),
    "`AutoBatchedLowRankMultivariateNormal`": Case(
        groups, guide=lambda m: autoguide.AutoBatchedLowRankMultivariateNormal(m, batch_ndim=0)
    ),
    **{
        f"`{name}`": Case(
            of(logistic), guide=getattr(autoguide, name), message=f"{name} computes its posterior"
        )
        for name in ("AutoLaplaceApproximation", "AutoDAIS")
    },
    "`AutoSemiDAIS`": Case(
        of(logistic),
        guide=lambda m: autoguide.AutoSemiDAIS(m, m, autoguide.AutoDelta(m)),
        message="AutoSemiDAIS computes its posterior",
    ),
    "`AutoSurrogateLikelihoodDAIS`": Case(
        of(logistic),
        guide=lambda m: autoguide.AutoSurrogateLikelihoodDAIS(m, m),
        message="AutoSurrogateLikelihoodDAIS computes its posterior",
    ),
}
