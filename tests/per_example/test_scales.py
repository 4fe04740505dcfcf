"""Elementwise products of a parameter and data: scales of normalizations and the like."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rule_laws import check_laws, floats, sites_of

import dpoptax
from dpoptax.per_example._norm_rules.scale import ElementwiseScale

BATCH, TOKENS, WIDTH, LAYERS = 5, 3, 4, 2
WEIGHTS = np.float32([0.3, 0.0, 2.0, 1.0, 0.7])
FORMS = ("factored", "recomputed")

# By name of the parameter: its shape. The loss uses each in another way.
LEAVES = {
    "norm": (WIDTH,),
    "both ways": (WIDTH,),
    "column": (TOKENS, 1),
    "matrix": (TOKENS, WIDTH),
    "scalar": (),
    "one": (1,),
    "twice": (WIDTH,),
    "squared": (WIDTH,),
    "left": (WIDTH,),
    "right": (WIDTH,),
    "joined": (1,),
    "to this": (WIDTH - 1,),
    "repeated": (WIDTH,),
    "by a number": (WIDTH, 2),
    "also in a product": (WIDTH, WIDTH),
    "by whole numbers": (WIDTH,),
    "on condition": (WIDTH,),
    "shared by steps": (WIDTH,),
    "layers": (LAYERS, WIDTH),
    "empty": (0,),
}


def loss_fn(w, x):
    return sum(jnp.sum(jnp.tanh(term) * (1 + term)) for term in terms(w, x))


def narrow_loss_fn(w, x):
    hidden = jnp.tanh(x)
    terms = [
        hidden * w["narrow"],
        hidden.astype(jnp.bfloat16) * w["cast"].astype(jnp.bfloat16),
    ]
    return sum(jnp.sum(jnp.tanh(term.astype(jnp.float32))) for term in terms)


def terms(w, x):
    hidden = jnp.tanh(x)
    size = jax.lax.rsqrt(jnp.mean(hidden**2, axis=-1, keepdims=True) + 1e-3)

    @jax.checkpoint
    def layer(carry, scale):
        return jnp.sin(carry * scale), None

    def step(carry, row):
        return jnp.sin(carry * w["shared by steps"] + row), None

    return [
        hidden * w["norm"],
        hidden * (size * w["both ways"]),
        w["column"] * hidden,
        hidden * w["matrix"],
        w["scalar"] * hidden,
        hidden * w["one"],
        jnp.sin(hidden * w["twice"]) * w["twice"],
        hidden * w["squared"] * w["squared"] + w["squared"] * w["squared"],
        hidden * (w["left"] * w["right"]),
        hidden * jnp.concatenate([w["joined"], w["to this"]]),
        hidden * jnp.broadcast_to(w["repeated"], (TOKENS, WIDTH)),
        hidden @ (0.5 * w["by a number"]),
        hidden @ w["also in a product"],
        hidden[0] * w["also in a product"],
        (x > 0).astype(jnp.int32) * w["by whole numbers"],
        jax.lax.cond(
            x[0, 0] > 0, lambda x: x * w["on condition"], lambda x: w["on condition"] - x, hidden
        ),
        jax.lax.scan(step, hidden[0], hidden)[0],
        jax.lax.scan(layer, hidden, w["layers"])[0],
        jnp.zeros((TOKENS, 0)) * w["empty"],
    ]


def model():
    rng = np.random.default_rng(0)
    params = {
        name: jnp.asarray(rng.normal(1, 0.3, shape), jnp.float32) for name, shape in LEAVES.items()
    }
    return params, np.float32(rng.normal(size=(BATCH, TOKENS, WIDTH)))


@functools.cache
def program():
    """Norms, sums and gradients of all forms under a mask, and those of `vmap(grad)`."""

    @jax.jit
    def run(params, examples, mask):
        exact = jax.vmap(jax.grad(loss_fn), (None, 0))(params, examples)
        found = []
        for form in FORMS:
            grads_fn = dpoptax.per_example_grads(loss_fn, form=form, allow_unused=True)
            grads = grads_fn(params, examples, mask=mask)
            sums = grads.weighted_sum(jnp.asarray(WEIGHTS))
            found.append((grads.squared_norms(), sums, grads.stacked()))
        return exact, found

    return run


@pytest.fixture
def _mixed_dtypes():
    with jax.numpy_dtype_promotion("standard"):
        yield


def check(found, exact, tolerance):
    norms, sums, stacked = found
    for name, leaf in exact.items():
        expected = np.asarray(leaf, np.float64).reshape(BATCH, -1)
        size = np.linalg.norm(expected, axis=1)
        np.testing.assert_allclose(np.sqrt(norms[name]), size, rtol=tolerance, err_msg=name)
        total = np.asarray(WEIGHTS, np.float64) @ expected
        error = np.asarray(sums[name], np.float64).ravel() - total
        assert np.linalg.norm(error) <= tolerance * np.linalg.norm(total), name
        error = np.asarray(stacked[name], np.float64).reshape(BATCH, -1) - expected
        assert np.linalg.norm(error) <= tolerance * np.linalg.norm(expected), name


@pytest.mark.seconds
@pytest.mark.usefixtures("_mixed_dtypes")
def test_norms_and_sums_are_those_of_vmap_grad():
    params, examples = model()
    exact, found = program()(params, examples, np.ones(BATCH, bool))
    for of_form in found:
        check(of_form, exact, 2e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("_mixed_dtypes")
@pytest.mark.parametrize("form", FORMS)
def test_scales_in_16_bits_have_gradients_in_float32(form):
    params = {"narrow": jnp.full(WIDTH, 0.7, jnp.bfloat16), "cast": jnp.full(WIDTH, 0.7)}
    _, examples = model()
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    exact = jax.vmap(jax.grad(narrow_loss_fn), (None, 0))(wide, examples)
    grads = dpoptax.per_example_grads(narrow_loss_fn, form=form)(params, examples)
    sums = grads.weighted_sum(jnp.asarray(WEIGHTS))
    check((grads.squared_norms(), sums, grads.stacked()), exact, 3e-2)
    assert {leaf.dtype for leaf in jax.tree.leaves(sums)} == {jnp.dtype(jnp.float32)}


@pytest.mark.seconds
@pytest.mark.usefixtures("_mixed_dtypes")
@pytest.mark.parametrize("filler", [1e30, np.nan])
def test_padding_changes_nothing(filler):
    params, examples = model()
    mask = np.arange(BATCH) != 2
    _, expected = program()(params, np.where(mask[:, None, None], examples, 0), mask)
    _, found = program()(params, np.where(mask[:, None, None], examples, filler), mask)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.usefixtures("_mixed_dtypes")
def test_explain_says_which_scales_have_a_rule():
    rows = {row.leaf[2:-2]: row for row in dpoptax.explain(loss_fn, *model())}
    stacked = {name for name, row in rows.items() if row.form == "stacked"}
    assert stacked == {
        "empty", "squared", "left", "right", "repeated", "on condition", "shared by steps",
    }  # fmt: skip
    by_scale = {name for name, row in rows.items() if row.rule == "scale"}
    assert by_scale == {
        "norm", "both ways", "column", "matrix", "scalar", "one", "by a number", "layers",
        "by whole numbers",
    }  # fmt: skip


def test_sums_over_positions_are_in_float32():
    """4,096 equal terms: a running sum in bfloat16 would stop growing at 256."""

    def loss(w, x):
        return jnp.sum((x * w.astype(x.dtype)).astype(jnp.float32))

    ones = jnp.ones((2, 4096, 1), jnp.bfloat16)

    @jax.jit
    def sums(w, x):
        return [
            dpoptax.per_example_grads(loss, form=form)(w, x).weighted_sum(jnp.ones(2))
            for form in FORMS
        ]

    np.testing.assert_array_equal(sums(jnp.ones(1), ones), np.full((len(FORMS), 1), 8192))


def test_factors_of_a_scale_are_no_larger_than_its_gradients():
    """Input and cotangent would be 4,096 times as large."""
    grads = jax.eval_shape(
        dpoptax.per_example_grads(lambda w, x: jnp.sum(jnp.tanh(x * w))),
        jnp.ones(2),
        jnp.ones((3, 4096, 2)),
    )
    assert sum(leaf.size for leaf in jax.tree.leaves((grads.factors, grads.materialized))) == 6


def test_a_norm_covers_terms_that_cancel():
    """The two passes may add the terms in another order, so rounding errors count."""
    terms = np.float32(np.random.default_rng(0).normal(size=(2, 1000, 1)))
    terms -= terms.mean(axis=1, keepdims=True)

    def loss(w, x):
        return jnp.sum(x * w)

    norms = dpoptax.per_example_grads(loss, form="recomputed")(jnp.ones(1), terms).squared_norms()
    assert np.all(norms >= np.square(np.sum(np.float64(terms), axis=(1, 2))))
    eps, size = np.finfo(np.float32).eps, np.sum(np.float64(terms) ** 2, axis=(1, 2))
    assert np.all(norms > (4 * eps * 1000) ** 2 * size)


def test_the_rule_takes_one_run_of_one_product():
    def twice(w, x):
        return jnp.sum(jnp.sin(x * w) * w)

    (site,), spec = sites_of(lambda w, x: jnp.sum(jnp.tanh(x * w)), (4,), floats(3, 4))
    check_laws(ElementwiseScale.matches([site.equation], spec))
    sites, spec = sites_of(twice, (4,), floats(3, 4))
    assert ElementwiseScale.matches([site.equation for site in sites], spec) is None
    (site,), spec = sites_of(lambda w, x: jnp.sum(jnp.tanh(x @ w)), (4, 3), floats(3, 4))
    assert ElementwiseScale.matches([site], spec) is None
