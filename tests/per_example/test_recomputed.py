"""Recomputed gradients: those of `vmap(grad)`, at the memory of a plain gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import ARCHITECTURES, by_leaf

import dpoptax
from dpoptax.per_example._recomputed import RecomputedGrads

slow = pytest.mark.slow
QUICK = ("linen mlp", "lookup beyond the table, filled")
BATCH, WIDTH, LAYERS = 6, 16, 3
WEIGHTS = jnp.array([0.3, 0.0, 2.0, 1.0, 0.7, 0.1])
MASK = jnp.array([True, True, False, True, True, True])


def deep_loss(params, x):
    """Residual layers in `jax.checkpoint`, scanned over depth, computed in bfloat16 if asked."""

    @jax.checkpoint
    def layer(x, weights):
        hidden = jnp.tanh(x @ weights["in"].astype(x.dtype) + weights["bias"].astype(x.dtype))
        return x + hidden @ weights["out"].astype(x.dtype), None

    x, _ = jax.lax.scan(layer, x, {name: params[name] for name in ("in", "bias", "out")})
    # Used twice, so its two sites must be seen together.
    twice = jnp.tanh(x @ params["twice"].astype(x.dtype)) @ params["twice"].astype(x.dtype)
    return jnp.mean(twice.astype(jnp.float32) ** 2) * params["scale"]


def deep_params(width=WIDTH, layers=LAYERS):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"in": (layers, width, 2 * width), "out": (layers, 2 * width, width)}
    params = {
        name: jax.random.normal(key, shape) / width**0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    params["bias"] = 0.1 * jax.random.normal(keys[2], (layers, 2 * width))
    params["twice"] = jax.random.normal(keys[3], (width, width)) / width**0.5
    return params | {"scale": jnp.ones(())}


def examples(dtype=jnp.float32):
    return jax.random.normal(jax.random.key(1), (BATCH, 5, WIDTH), dtype)


def readings(loss_fn, params, batch, **options):
    """Norms, weighted sum and stacked gradients under the mask; each leaf has its own weights."""

    @jax.jit
    def read(params, batch):
        grads = dpoptax.per_example_grads(loss_fn, **options)(params, batch, mask=MASK)
        sums = grads.weighted_sum(by_leaf(WEIGHTS, params))
        return grads.squared_norms(), sums, grads.stacked()

    return read(params, batch)


def assert_close(found, expected, tolerance=1e-5):
    """To `tolerance` of the whole tree."""
    for part, exact in zip(found, expected, strict=True):
        size = np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(exact)))
        for a, b in zip(jax.tree.leaves(part), jax.tree.leaves(exact), strict=True):
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * size)


# These take longest to compile. Attention, an LSTM and a decoder stay.
LONG_TO_COMPILE = (
    "linen convolutions",
    "linen concatenated lstm",
    "linen gru",
    "linen 3-d convolution",
    "nnx gru",
    "nnx text",
    "haiku lstm",
    "equinox convolutions",
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=()
            if name in QUICK
            else pytest.mark.nightly
            if name in LONG_TO_COMPILE
            else pytest.mark.slow,
        )
        for name in ARCHITECTURES
    ],
)
def test_norms_and_sums_are_those_of_vmap_grad(name):
    with jax.numpy_dtype_promotion("standard"):  # Flax itself mixes dtypes in places
        loss_fn, params, batch = ARCHITECTURES[name](BATCH)
        found = readings(loss_fn, params, batch, form="recomputed")
        assert_close(found, readings(loss_fn, params, batch, form="stacked"))


@pytest.mark.slow
def test_layers_in_a_checkpoint_are_recomputed_and_others_factored():
    params = deep_params()
    grads = dpoptax.per_example_grads(deep_loss)(params, examples())
    assert isinstance(grads, RecomputedGrads)
    assert len(grads.norms) == 4  # not that of the weight that is used twice
    assert_close(
        readings(deep_loss, params, examples()),
        readings(deep_loss, params, examples(), form="stacked"),
    )
    plain = dpoptax.per_example_grads(lambda w, x: jnp.sum(jnp.tanh(x @ w)))
    assert not isinstance(plain(params["twice"], examples()), RecomputedGrads)


def test_a_row_of_nan_has_no_weight_and_adds_nothing():
    params, batch = deep_params(), examples()
    rule = dpoptax.clipping.FlatClip(0.1)

    @jax.jit
    def clip_and_sum(batch, mask):
        grads = dpoptax.per_example_grads(deep_loss)(params, batch, mask=mask)
        return grads.clip_and_sum(rule.weights)

    poisoned = clip_and_sum(batch.at[3].set(jnp.nan), jnp.ones(BATCH, bool))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7),
        poisoned,
        clip_and_sum(batch, jnp.arange(BATCH) != 3),
    )


def test_computation_in_bfloat16_is_summed_in_float32():
    """Each contribution is as long as the norm says, and adding up loses nothing."""
    params = deep_params()
    batch = examples(jnp.bfloat16)

    @jax.jit
    def read(batch):
        grads = dpoptax.per_example_grads(deep_loss)(params, batch)
        norms = jnp.sqrt(grads.global_squared_norms())
        alone = jnp.eye(BATCH) / norms
        return jax.lax.map(grads.weighted_sum, alone), grads.weighted_sum(1 / norms)

    alone, together = read(batch)
    lengths = np.sqrt(
        sum(np.sum(np.asarray(leaf).reshape(BATCH, -1) ** 2, 1) for leaf in jax.tree.leaves(alone))
    )
    # Norms are rounded up, never down.
    assert np.all(lengths <= 1)
    assert np.all(lengths > 0.95)
    jax.tree.map(
        lambda one, whole: np.testing.assert_allclose(one.sum(0), whole, rtol=1e-4, atol=1e-5),
        alone,
        together,
    )


def test_uses_that_are_the_same_for_all_examples_have_a_cotangent_for_each():
    """Positions looked up twice, and a scale times a number: no example in another's gradient."""

    def loss_fn(params, x):
        layer = jax.checkpoint(lambda x, w: (jnp.sin(x @ w), None))
        x, _ = jax.lax.scan(layer, x + params["positions"][jnp.arange(5)], params["layers"])
        x = x * (0.5 * params["scale"]) + jnp.sin(2.0 * params["scale"])
        return jnp.sum(jnp.tanh(x * params["positions"][jnp.arange(1, 6)]))

    params = {
        "positions": jnp.ones((6, WIDTH)),
        "layers": 0.1 * jnp.ones((2, WIDTH, WIDTH)),
        "scale": jnp.ones(WIDTH),
    }
    assert_close(
        readings(loss_fn, params, examples(), form="recomputed"),
        readings(loss_fn, params, examples(), form="stacked"),
    )


def test_a_mask_that_is_replaced_counts_for_all_parameters():
    @jax.jit
    def replaced_and_given(params, batch):
        grads_fn = dpoptax.per_example_grads(deep_loss)
        replaced = dataclasses.replace(grads_fn(params, batch), mask=MASK)
        return replaced.weighted_sum(WEIGHTS), grads_fn(params, batch, mask=MASK).weighted_sum(
            WEIGHTS
        )

    replaced, given = replaced_and_given(deep_params(), examples())
    assert_close([replaced], [given])


def test_gradients_cross_jit():
    params, batch = deep_params(), examples()
    grads = jax.jit(dpoptax.per_example_grads(deep_loss))(params, batch)

    @jax.jit
    def expected(params, batch):
        stacked = dpoptax.per_example_grads(deep_loss, form="stacked")(params, batch)
        return stacked.squared_norms(), stacked.weighted_sum(WEIGHTS)

    assert_close(
        [grads.squared_norms(), jax.jit(lambda grads: grads.weighted_sum(WEIGHTS))(grads)],
        expected(params, batch),
    )


@pytest.mark.slow
def test_the_memory_is_that_of_a_plain_gradient():
    """By XLA's own figures; factors of all layers would need several times as much."""
    params = deep_params(width=128, layers=12)
    batch = jnp.zeros((16, 64, 128))

    def plain(params, batch):
        return jax.grad(lambda params: jnp.sum(jax.vmap(deep_loss, (None, 0))(params, batch)))(
            params
        )

    def private(form, params, batch):
        grads = dpoptax.per_example_grads(deep_loss, form=form)(params, batch)
        return grads.clip_and_sum(dpoptax.clipping.FlatClip(1.0).weights)

    def memory(function):
        compiled = jax.jit(function).lower(params, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    needed = memory(plain)
    assert memory(functools.partial(private, "auto")) < 1.5 * needed
    assert memory(functools.partial(private, "factored")) > 2 * needed


def test_explain_says_what_is_recomputed():
    forms = {row.leaf: row.form for row in dpoptax.explain(deep_loss, deep_params(), examples())}
    assert forms["['in']"] == forms["['out']"] == forms["['bias']"] == "recomputed"
    assert forms["['twice']"] in ("factored", "materialized")
    assert forms["['scale']"] == "recomputed"


@pytest.mark.untyped
def test_an_unknown_form_is_refused_by_name():
    with pytest.raises(ValueError, match="form must be one of auto, factored, recomputed, stacked"):
        dpoptax.per_example_grads(deep_loss, form="ghost")


def test_a_derivative_of_recomputed_gradients_is_refused():
    """It would be zero for convolutions: each pass is differentiated already."""

    def loss(kernel, image):
        return jnp.sum(jnp.tanh(jax.lax.conv(image, kernel, (1, 1), "SAME")) ** 2)

    def summed(kernel, form):
        grads = dpoptax.per_example_grads(loss, form=form)(kernel, jnp.ones((2, 1, 1, 4, 4)))
        return jnp.sum(grads.weighted_sum(jnp.ones(2)) ** 2)

    kernel = 0.1 * jnp.ones((1, 1, 3, 3))
    with pytest.raises(ValueError, match=r'differentiated again.*form="factored"'):
        jax.grad(summed)(kernel, "recomputed")
    assert float(jnp.abs(jax.grad(summed)(kernel, "factored")).max()) > 0
    assert float(summed(kernel, "recomputed")) > 0
