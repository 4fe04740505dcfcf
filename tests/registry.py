"""What every law is tested over: gradient forms, clip rules, mechanisms and samplers.

A new one joins all laws by one line in its table. `test_extension.py` shows how.
"""

from unittest import mock

import jax
import jax.numpy as jnp
import optax
from strategies import CORRELATED

import dpoptax
from dpoptax import transforms
from dpoptax.per_example import _trimmed
from dpoptax.per_example._api import deferred_values_and_grads


def stacked(loss_fn):
    """The reference: a vmapped gradient."""
    return dpoptax.per_example_grads(loss_fn, form="stacked")


def factored(loss_fn):
    """Inputs and cotangents of linear operations, without their products."""
    return dpoptax.per_example_grads(loss_fn)


def recomputed(loss_fn):
    """Norms in one backward pass, the sum in a second one."""
    return dpoptax.per_example_grads(loss_fn, form="recomputed")


def microbatched(loss_fn):
    """A few examples at a time."""
    return dpoptax.per_example_grads(loss_fn, microbatch_size=3)


def trimmed(loss_fn):
    """All rows, or only the usual ones if the others are padding."""
    with_values = deferred_values_and_grads(loss_fn, usual_size=2)

    def grads_fn(params, examples, *, mask=None, key=None):
        with mock.patch.object(_trimmed, "LEAST_FLOPS", 0.0):
            return with_values(params, examples, mask=mask, key=key)[1]

    return grads_fn


FORMS = {
    "stacked": stacked,
    "factored": factored,
    "recomputed": recomputed,
    "microbatched": microbatched,
    "trimmed": trimmed,
}

# From the bound on the norm of one example's contribution to a clip rule for `params`.
CLIP_RULES = {
    "flat": dpoptax.clipping.FlatClip,
    "group": lambda bound: dpoptax.clipping.GroupClip(
        {"w": 0.6 * bound, "b": 0.64 * bound, "s": 0.48 * bound}
    ),
    "per layer": dpoptax.clipping.PerLayerClip,
    "per layer, by size": lambda bound: dpoptax.clipping.PerLayerClip.by_size(bound, params()),
    "AUTO-S": dpoptax.clipping.AutoSClip,
    "PSAC": dpoptax.clipping.PsacClip,
    "normalized": dpoptax.clipping.NormalizedClip,
}

# From the bound of the first step to a clip rule with state.
CLIP_RULES_WITH_STATE = {"quantile": dpoptax.clipping.QuantileClip}

MECHANISMS = {
    "gaussian": dpoptax.mechanisms.Gaussian,
    "gaussian, four draws": lambda: dpoptax.mechanisms.Gaussian(num_draws=4),
    "discrete gaussian": dpoptax.mechanisms.DiscreteGaussian,
}

MECHANISMS_WITH_STATE = {f"correlated, {name}": make for name, make in CORRELATED.items()}

# From a learning rate to an optimizer for `fit`, and the one of Optax that it is without clip and
# noise, with its own filter turned off.
OPTIMIZERS = {
    "adam": (optax.adam, optax.adam),
    "adam_bc": (
        lambda rate: optax.chain(transforms.scale_by_adam_bc(), optax.scale_by_learning_rate(rate)),
        optax.adam,
    ),
    "scale_then_privatize": (
        lambda rate: transforms.scale_then_privatize(optax.adam(rate)),
        optax.adam,
    ),
    "scale_then_privatize, by leaf": (
        lambda rate: transforms.scale_then_privatize(optax.adam(rate), per_leaf=True),
        optax.adam,
    ),
    "disk": (lambda rate: transforms.disk(optax.sgd(rate), gain=1.0), optax.sgd),
    "low_pass": (
        lambda rate: optax.chain(transforms.low_pass((1.0,), ()), optax.sgd(rate)),
        optax.sgd,
    ),
    "average_params": (
        lambda rate: optax.chain(optax.sgd(rate), transforms.average_params()),
        optax.sgd,
    ),
}

# From a number of examples and a batch size to a sampler.

SAMPLERS = {
    "poisson": lambda n, b: dpoptax.samplers.Poisson(n, b),
    "poisson, truncated": lambda n, b: dpoptax.samplers.Poisson(n, b, max_batch_size=b),
    "fixed size": lambda n, b: dpoptax.samplers.FixedSize(n, b),
    "shuffled": lambda n, b: dpoptax.samplers.Shuffled(n, b),
    "balls in bins": lambda n, b: dpoptax.samplers.BallsInBins(n, n // b),
    "cyclic poisson": lambda n, b: dpoptax.samplers.CyclicPoisson(n, b, 3),
    "random cyclic poisson": lambda n, b: dpoptax.samplers.RandomCyclicPoisson(n, b, 3),
    "min separated": lambda n, b: dpoptax.samplers.MinSeparated(n, n // b, 2),
    "poisson schedule": lambda n, b: dpoptax.samplers.PoissonSchedule(
        [(dpoptax.samplers.Poisson(n, b), 5)]
    ),
    "user examples poisson": lambda n, b: dpoptax.samplers.UserExamplesPoisson(
        range(n), b, max_examples_per_user=1
    ),
    "user poisson": lambda n, b: dpoptax.samplers.UserPoisson(range(n), b, max_examples_per_user=1),
}


def loss(params, example):
    """A small nonlinear model with a matrix, a vector and a scalar leaf."""
    x, y = example
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    return jnp.sum((hidden - y) ** 2) * params["s"]


def params(key=None):
    """Parameters of `loss`."""
    key = jax.random.key(11) if key is None else key
    return {
        "w": 0.5 * jax.random.normal(key, (5, 3)),
        "b": jnp.linspace(-1.0, 1.0, 3),
        "s": jnp.ones(()),
    }


def examples(batch, key=None):
    """A batch for `loss`, with gradients of very different norms."""
    x_key, y_key = jax.random.split(jax.random.key(12) if key is None else key)
    sizes = jnp.geomspace(0.003, 10.0, max(batch, 1))[:batch, None]
    return sizes * jax.random.normal(x_key, (batch, 5)), jax.random.normal(y_key, (batch, 3))


def wide_loss(params, example):
    """A model whose large leaves are kept as factors: they have more numbers than the factors."""
    tokens, x = example
    embedded = params["table"][tokens]
    hidden = jnp.tanh(embedded @ params["sequence"] + x @ params["outer"])
    return jnp.sum(hidden**2) + jnp.sum(params["bias"] * hidden)


def wide_params():
    """Parameters of `wide_loss`."""
    keys = jax.random.split(jax.random.key(21), 3)
    return {
        "table": jax.random.normal(keys[0], (50, 40)),
        "sequence": 0.2 * jax.random.normal(keys[1], (40, 30)),
        "outer": 0.2 * jax.random.normal(keys[2], (40, 30)),
        "bias": jnp.linspace(-1.0, 1.0, 30),
    }


def wide_examples(batch, key):
    """A batch for `wide_loss`: three tokens, of which some are equal, and a vector."""
    token_key, x_key = jax.random.split(key)
    tokens = jax.random.randint(token_key, (batch, 3), 0, 4)
    sizes = jnp.geomspace(0.01, 10.0, batch)[:, None]
    return tokens, sizes * jax.random.normal(x_key, (batch, 40))


def global_norm(tree):
    """The L2 norm of all leaves together."""
    return float(jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree))))


def distance(tree, other):
    """The L2 norm of the difference of two trees."""
    return global_norm(jax.tree.map(jnp.subtract, tree, other))
