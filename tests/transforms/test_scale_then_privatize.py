"""Scale-then-privatize clips the scaled gradient in every form, and scales the noise back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import registry

import dpoptax
from dpoptax.per_example._stacked import StackedGrads
from dpoptax.transforms import chain, scale_then_privatize
from dpoptax.transforms._scaled_grads import ScaledGrads

BY_LEAF = {"w": 3.0, "b": 0.25, "s": 1.0}
BY_COORDINATE = {"w": jnp.linspace(0.1, 8.0, 15).reshape(5, 3), "b": jnp.array([1.0, 9.0, 0.2]),
                 "s": 0.5}  # fmt: skip
CLIP = 20.0


def expected(scale, size=8):
    """By the definition, in NumPy: scale each gradient, clip it, sum, scale back."""
    params, examples = registry.params(), registry.examples(size)
    stacked = jax.vmap(jax.grad(registry.loss), (None, 0))(params, examples)
    scaled = jax.tree.map(lambda g, s: np.asarray(g, np.float64) * np.asarray(s), stacked, scale)
    norms = np.sqrt(sum(np.sum(g.reshape(size, -1) ** 2, 1) for g in jax.tree.leaves(scaled)))
    weights = np.minimum(1, CLIP / norms)
    assert 1 < np.sum(weights < 1) < size - 1  # both branches of the clip
    return jax.tree.map(
        lambda g, s: np.tensordot(weights, g, 1) / size / np.asarray(s), scaled, scale
    )


def release(grads, scale, params, noise_multiplier=0.0, size=8):
    private = dpoptax.privatize(
        CLIP, noise_multiplier, expected_batch_size=size, key=jax.random.key(0)
    )
    tx = chain(private, scale_then_privatize(optax.identity(), scale=lambda _: scale))
    return jax.jit(lambda *arguments: tx.update(*arguments)[0])(grads, tx.init(params), params)


@pytest.mark.parametrize("scale", [BY_LEAF, BY_COORDINATE], ids=["by leaf", "by coordinate"])
@pytest.mark.parametrize(
    "form",
    [
        pytest.param(form, id=name, marks=() if name == "factored" else pytest.mark.slow)
        for name, form in registry.FORMS.items()
    ],
)
def test_every_form_gives_the_clipped_sum_of_scaled_gradients(form, scale):
    params = registry.params()

    @jax.jit
    def run(params, examples):
        return release(form(registry.loss)(params, examples), scale, params)

    actual, right = run(params, registry.examples(8)), expected(scale)
    right = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), right)
    assert registry.distance(actual, right) < 1e-5 * registry.global_norm(right)


def test_a_scale_per_leaf_materializes_nothing(monkeypatch):
    def refuse(self):
        raise AssertionError("materialized")

    def trace(scale):
        grads = dpoptax.per_example_grads(registry.wide_loss)(
            registry.wide_params(), registry.wide_examples(8, jax.random.key(3))
        )
        monkeypatch.setattr(type(grads), "stacked", refuse)
        return release(grads, scale, registry.wide_params())

    scale = dict.fromkeys(registry.wide_params(), 2.0)
    jax.eval_shape(lambda: trace(scale))
    with pytest.raises(AssertionError, match="materialized"):
        jax.eval_shape(lambda: trace(scale | {"bias": jnp.ones(30)}))


@pytest.mark.parametrize("scale", [BY_LEAF, BY_COORDINATE], ids=["by leaf", "by coordinate"])
@pytest.mark.parametrize("filler", [0.0, 1e30, np.nan])
def test_padding_and_bad_gradients_contribute_nothing(scale, filler):
    params = registry.params()
    stacked = jax.vmap(jax.grad(registry.loss), (None, 0))(params, registry.examples(8))
    bad = jax.tree.map(lambda leaf: leaf.at[2].set(filler).at[5].set(jnp.nan), stacked)
    kept = jnp.arange(8) != 2
    zero = jax.tree.map(lambda leaf: leaf.at[2].set(0.0).at[5].set(0.0), stacked)
    found = release(StackedGrads(bad, kept), scale, params)
    right = release(StackedGrads(zero, kept), scale, params)
    assert registry.distance(found, right) == 0


@pytest.mark.seconds
@pytest.mark.parametrize("scale", [BY_LEAF, BY_COORDINATE], ids=["by leaf", "by coordinate"])
def test_one_example_moves_the_scaled_sum_by_the_clip_at_most(scale):
    """What is released with noise is the scaled sum: undoing the scale is post-processing."""
    params = registry.params()
    grads_fn = registry.factored(registry.loss)
    examples = jax.tree.map(lambda leaf: 1e3 * leaf, registry.examples(8))
    sums = [
        release(grads_fn(params, examples, mask=jnp.arange(8) < n), scale, params, size=1)
        for n in (7, 8)
    ]
    moved = jax.tree.map(lambda a, b, s: (a - b) * s, *sums, scale)
    assert 0.99 * CLIP < registry.global_norm(moved) < CLIP * (1 + 1e-4)


def test_scales_have_limits():
    """Far beyond, squares of small gradients vanish in float32 and would be taken for zero."""
    params = {"w": jnp.zeros(1)}
    grads = {"w": jnp.full((1, 1), 1e-20)}
    moved = release(grads, {"w": 1e30}, params, size=1)
    # The square underflows, so the gradient is not clipped; its scaled norm is below the clip.
    assert float(moved["w"][0]) * 1e4 <= CLIP
    for wrong in (jnp.nan, jnp.inf):
        assert np.isfinite(release({"w": jnp.ones((1, 1))}, {"w": wrong}, params, size=1)["w"])


@pytest.mark.seconds
def test_until_the_first_release_nothing_is_scaled():
    params = registry.params()
    grads = registry.factored(registry.loss)(params, registry.examples(8))
    private = dpoptax.privatize(CLIP, 1.0, expected_batch_size=8, key=jax.random.key(0))
    plain = dpoptax.privatize(CLIP, 1.0, expected_batch_size=8, key=jax.random.key(0))
    tx = chain(private, scale_then_privatize(optax.identity()))
    actual, state = jax.jit(tx.update)(grads, tx.init(params), params)
    right, _ = jax.jit(plain.update)(grads, plain.init(params), params)
    assert registry.distance(actual, right) < 1e-6
    moments = jax.tree.map(lambda g: 0.001 * np.square(g), right)
    assert registry.distance(state[0].second_moment, moments) < 1e-6
    by_leaf = chain(plain, scale_then_privatize(optax.identity(), per_leaf=True))
    moments = jax.eval_shape(by_leaf.init, params)[0].second_moment
    assert [leaf.shape for leaf in jax.tree.leaves(moments)] == [(), (), ()]


def test_scaled_gradients_refuse_arithmetic_and_show_nothing():
    grads = ScaledGrads(jnp.ones(2, bool), StackedGrads(jnp.ones((2, 3)), jnp.ones(2, bool)), 1.0)
    assert repr(grads) == "<ScaledGrads: per-example gradients, not private>"


def test_bad_numbers_are_refused():
    for arguments in ({"decay": 1.0}, {"eps": 0.0}, {"eps": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            scale_then_privatize(optax.sgd(1.0), **arguments)
    private = dpoptax.privatize(1.0, 1.0, expected_batch_size=1, key=jax.random.key(0))
    tx = chain(private, scale_then_privatize(optax.sgd(1.0)))
    with pytest.raises(ValueError, match=r"tx\.update\(grads, state, params\)"):
        tx.update({"w": jnp.ones((1, 3))}, tx.init({"w": jnp.ones(3)}))
