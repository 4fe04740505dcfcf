"""Models that keep state or draw random numbers: each example on its own, or refused by name."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dpoptax

KEY = jax.random.key(0)
ROWS = jnp.ones((6, 3))


class Net(nnx.Module):
    """A linear layer, and what a test adds to it."""

    def __init__(self, **layers):
        self.linear = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.names = tuple(layers)

    def __call__(self, x):
        x = self.linear(x)[None]
        for name in self.names:
            x = getattr(self, name)(x)
        return jnp.sum(x[0])


def with_dropout():
    return Net(dropout=nnx.Dropout(0.5, rngs=nnx.Rngs(1)))


def with_batch_norm():
    return Net(norm=nnx.BatchNorm(4, rngs=nnx.Rngs(0)))


def loss(model, example):
    return model(example)


def run(loss_fn, params, key=None):
    """Traces the gradients and computes nothing."""
    return jax.eval_shape(lambda: dpoptax.per_example_grads(loss_fn)(params, ROWS, key=key))


def merged(model, **options):
    """The recipe that a user writes by hand."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return lambda params, x: nnx.merge(graph, params, rest, **options)(x), params


# Dropout


def test_every_example_and_every_key_has_its_own_mask():
    loss_fn, params = dpoptax.nnx.loss_fn(with_dropout(), loss)
    run(loss_fn, params, KEY)
    keys = jax.random.split(KEY, 12).reshape(2, 6)
    # The rows are equal, so only the masks can make a difference.
    losses = jax.jit(jax.vmap(loss_fn, (None, None, 0)))
    first, second = (losses(params, ROWS[0], step) for step in keys)
    assert len(np.unique(np.round(first, 4))) > 2
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(first, losses(params, ROWS[0], keys[0]))


def test_two_streams_draw_different_numbers():
    layers = {name: nnx.Dropout(0.5, rngs=nnx.Rngs(1)) for name in ("first", "second")}

    def masks(model, x):
        one, two = (getattr(model, name)(jnp.ones(64)) for name in layers)
        return jnp.sum(model.linear(x)) * jnp.mean(one == two)

    loss_fn, params = dpoptax.nnx.loss_fn(Net(**layers), masks)
    whole = jnp.sum(params["linear"]["kernel"].get_value())
    # Equal masks would give 1, and opposite ones 0.
    assert 0.2 < float(jax.jit(loss_fn)(params, ROWS[0], KEY) / whole) < 0.8


def test_a_loss_may_take_a_key_of_its_own():
    def noisy(model, example, key):
        return jnp.sum(model.linear(example) * jax.random.normal(key, (4,)))

    loss_fn, params = dpoptax.nnx.loss_fn(Net(), noisy)
    run(loss_fn, params, KEY)
    assert loss_fn(params, ROWS[0], KEY) != loss_fn(params, ROWS[0], jax.random.key(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"dropout\.rngs\.count, of type RngCount.*dpoptax\.nnx\.loss_fn\(model, loss\)"),
        ({"copy": True}, r"a constant key at .*one mask of Dropout.*dpoptax\.nnx\.loss_fn"),
    ],
)
def test_a_shared_mask_is_refused(options, message):
    loss_fn, params = merged(with_dropout(), **options)
    for wrapped in (loss_fn, jax.jit(loss_fn), jax.checkpoint(loss_fn)):
        with pytest.raises(ValueError, match=message):
            run(wrapped, params)


def test_dropout_is_off_in_evaluation():
    model = with_dropout()
    model.eval()
    run(*merged(model))
    run(*dpoptax.nnx.loss_fn(model, loss), KEY)


class LinenDropout(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.sum(nn.Dropout(0.5, deterministic=False)(nn.Dense(4)(x)))


def test_a_linen_model_needs_the_key_of_the_example():
    model = LinenDropout()
    params = model.init({"params": KEY, "dropout": KEY}, ROWS[0])["params"]
    run(lambda p, x, key: model.apply({"params": p}, x, rngs={"dropout": key}), params, KEY)
    with pytest.raises(ValueError, match=r"constant key.*rngs=\{'dropout': key\}"):
        run(lambda p, x: model.apply({"params": p}, x, rngs={"dropout": KEY}), params)


def test_a_key_that_a_loop_changes_is_not_constant():
    """The first step of a loop may start from a constant; what counts are all of its steps."""
    model = LinenDropout()
    params = model.init({"params": KEY, "dropout": KEY}, ROWS[0])["params"]

    def loss_fn(params, x):
        def body(key, row):
            value = model.apply({"params": params}, x, rngs={"dropout": key})
            return jax.random.fold_in(key, row.astype(int)), value

        return jnp.sum(jax.lax.scan(body, KEY, x)[1])

    run(loss_fn, params)


# Batch statistics

STATE = r"mutable state: batch statistics mix examples.*GroupNorm, LayerNorm"


def test_a_changed_variable_is_named():
    with pytest.raises(ValueError, match=r"norm\.mean, of type BatchStat.*" + STATE):
        run(*merged(with_batch_norm()))
    with pytest.raises(ValueError, match=r"norm\.mean, of type BatchStat.*" + STATE):
        run(*dpoptax.nnx.loss_fn(with_batch_norm(), loss))


class LinenBatchNorm(nn.Module):
    use_running_average: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(self.use_running_average)(nn.Dense(4)(x[None]))
        return jnp.sum(nn.Dense(1)(x))


def linen(**options):
    model = LinenBatchNorm(**options)
    variables = model.init(KEY, ROWS[0])

    def loss_fn(params, x):
        variables_now = {**variables, "params": params}
        return model.apply(variables_now, x, mutable=["batch_stats"])[0]

    return loss_fn, variables["params"]


def haiku(is_training=True):
    def forward(x, is_training):
        with jax.numpy_dtype_promotion("standard"):  # Haiku mixes dtypes
            return jnp.sum(hk.BatchNorm(True, True, 0.9)(hk.Linear(4)(x[None]), is_training))

    model = hk.transform_with_state(forward)
    params, state = model.init(KEY, ROWS[0], True)
    return lambda params, x: model.apply(params, state, None, x, is_training)[0], params


def equinox(inference=False):
    norm = eqx.nn.BatchNorm(3, axis_name="batch", mode="batch", inference=inference)

    def loss_fn(weight, x):
        state = eqx.nn.State(norm)  # can be used once
        outputs = jax.vmap(lambda x: norm(weight * x, state)[0], axis_name="batch")(x[None])
        return jnp.sum(outputs)

    return loss_fn, jnp.ones(3)


def nnx_model():
    return merged(with_batch_norm(), copy=True)


@pytest.mark.slow
@pytest.mark.parametrize("make", [linen, nnx_model, haiku, equinox])
def test_batch_norm_is_refused_though_its_update_is_dropped(make):
    loss_fn, params = make()
    # The statistics of one example remove the example.
    outputs = jax.jit(jax.vmap(loss_fn, (None, 0)))(params, jax.random.normal(KEY, (4, 3)))
    np.testing.assert_allclose(np.ptp(outputs), 0, atol=1e-5)
    for wrapped in (loss_fn, jax.jit(loss_fn), jax.checkpoint(loss_fn)):
        with pytest.raises(ValueError, match=r"in BatchNorm at .*\.py:\d+.*" + STATE):
            run(wrapped, params)


@pytest.mark.seconds
def test_fixed_statistics_are_allowed():
    run(*linen(use_running_average=True))
    run(*haiku(is_training=False))
    run(*equinox(inference=True))
    model = with_batch_norm()
    model.eval()
    run(*merged(model, copy=True))
    run(*dpoptax.nnx.loss_fn(model, loss))


def test_normalizations_within_the_example_are_allowed():
    for norm in (nnx.LayerNorm(4, rngs=nnx.Rngs(0)), nnx.GroupNorm(4, 2, rngs=nnx.Rngs(0))):
        run(*merged(Net(norm=norm)))


# The helper


def test_only_the_chosen_variables_are_trained():
    model = Net(lora=nnx.LoRA(4, 2, 4, rngs=nnx.Rngs(0)))
    loss_fn, params = dpoptax.nnx.loss_fn(model, loss, wrt=nnx.LoRAParam)
    assert set(params) == {"lora"}
    grads = run(loss_fn, params)
    assert set(grads.parameter_specs()) == {"lora"}


@pytest.mark.untyped
def test_the_helper_refuses_wrong_arguments():
    model = Net()
    with pytest.raises(TypeError, match=r"must be an nnx\.Module; got GraphDef"):
        dpoptax.nnx.loss_fn(nnx.split(model)[0], loss)
    with pytest.raises(TypeError, match=r"loss must take \(model, example\)"):
        dpoptax.nnx.loss_fn(model, lambda model: 0.0)
    with pytest.raises(ValueError, match=r"wrt=.*LoRAParam.* must match Variables of the model"):
        dpoptax.nnx.loss_fn(model, loss, wrt=nnx.LoRAParam)


def test_the_model_takes_the_trained_parameters_back():
    model = with_dropout()
    _, params = dpoptax.nnx.loss_fn(model, loss)
    nnx.update(model, jax.tree.map(lambda leaf: leaf + 1.0, params))
    np.testing.assert_array_equal(model.linear.bias.get_value(), 1.0)
