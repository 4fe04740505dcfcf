"""Mixtures of experts by `jax.lax.ragged_dot`, which JAX cannot run under `vmap` by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rule_laws import BATCH, check_laws, sites_of

import dpoptax
from dpoptax.per_example import _grouped_rows
from dpoptax.per_example._norm_rules import Factors
from dpoptax.per_example._norm_rules.ragged_dot import DirectRagged, GramRagged

EXPERTS, ROWS, WIDTH, HIDDEN, LAYERS = 3, 6, 4, 5, 2
MASK = np.array([True, True, False, True, True])
WEIGHTS = np.float32([0.3, 0.0, 2.0, 1.0, 0.7])


def experts_of(x, router):
    """Each row goes to two experts: rows sorted by expert, their order, sizes and shares."""
    shares, chosen = jax.lax.top_k(jax.nn.softmax((x @ router).astype(jnp.float32)), 2)
    order = jnp.argsort(chosen.reshape(-1))
    sizes = jnp.bincount(chosen.reshape(-1), length=EXPERTS)
    return jnp.repeat(x, 2, axis=0)[order], order, sizes, shares


def mixture(w, x):
    rows, order, sizes, shares = experts_of(x, w["router"])
    product = functools.partial(jax.lax.ragged_dot, group_sizes=sizes)
    hidden = jax.nn.silu(product(rows, w["gate"])) * product(rows, w["up"])
    outputs = product(hidden, w["down"].swapaxes(1, 2))[jnp.argsort(order)]
    outputs = outputs.reshape(len(x), 2, -1)
    return x + jnp.einsum("tkd,tk->td", outputs, shares.astype(x.dtype))


def loss_fn(w, x):
    """Layers in a checkpoint, frozen experts without a parameter, and experts used twice."""
    narrow = functools.partial(jax.tree.map, lambda leaf: leaf.astype(x.dtype))
    layer = jax.checkpoint(lambda x, w: (mixture(narrow(w), x), None))
    x, _ = jax.lax.scan(layer, x, w["layers"])
    sizes = jnp.array([1, 3, 1])  # one row belongs to no group
    frozen = jnp.ones((EXPERTS, WIDTH, WIDTH), x.dtype)
    x = x + jax.jit(jax.lax.ragged_dot)(jnp.sin(x), frozen, sizes)
    twice = w["twice"].astype(x.dtype)
    x = jnp.tanh(jax.lax.ragged_dot(x, twice, sizes))
    x = jax.lax.ragged_dot(x, twice, sizes, preferred_element_type=jnp.float32)
    return jnp.sum(jnp.tanh(x) * (1 + x))


def model(dtype=jnp.float32):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(0, 0.6, shape), jnp.float32)

    layers = {
        "router": draw(LAYERS, WIDTH, EXPERTS),
        "gate": draw(LAYERS, EXPERTS, WIDTH, HIDDEN),
        "up": draw(LAYERS, EXPERTS, WIDTH, HIDDEN),
        "down": draw(LAYERS, EXPERTS, WIDTH, HIDDEN),
    }
    params = {"layers": layers, "twice": draw(EXPERTS, WIDTH, WIDTH)}
    return params, jnp.asarray(rng.normal(size=(BATCH, ROWS, WIDTH)), dtype)


def readings(form):
    """Norms, sums and gradients under a mask, compiled once for each dtype of the examples."""

    def run(params, examples):
        grads = dpoptax.per_example_grads(loss_fn, form=form)(params, examples, mask=MASK)
        return grads.squared_norms(), grads.weighted_sum(jnp.asarray(WEIGHTS)), grads.stacked()

    return jax.jit(run)


def one_by_one(params, examples):
    """`jax.grad` in a loop, since JAX has no `vmap` of it."""
    grad = jax.jit(jax.grad(loss_fn))
    found = [grad(params, example) for example in examples]
    return jax.tree.map(
        lambda *leaves: np.stack([np.asarray(x, np.float64) for x in leaves]), *found
    )


@pytest.fixture(params=["loop", pytest.param("sorting", marks=pytest.mark.slow)])
def _either_way(request, monkeypatch):
    """As on a CPU, and as on other devices."""
    monkeypatch.setattr(_grouped_rows, "_sorts", lambda: request.param == "sorting")


@pytest.mark.seconds
@pytest.mark.usefixtures("_either_way")
@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        ("recomputed", jnp.float32),
        pytest.param("stacked", jnp.float32, marks=pytest.mark.slow),
        pytest.param("factored", jnp.float32, marks=pytest.mark.slow),
        pytest.param("recomputed", jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param("factored", jnp.bfloat16, marks=pytest.mark.nightly),
    ],
)
def test_norms_and_sums_are_those_of_a_loop(form, dtype):
    params, examples = model(dtype)
    exact = one_by_one(params, examples)
    tolerance = 2e-5 if dtype == jnp.float32 else 0.03
    poisoned = examples.at[2].set(jnp.nan)  # a padded row
    norms, sums, stacked = readings(form)(params, poisoned)
    for (path, leaf), norm, total, each in zip(
        jax.tree.leaves_with_path(exact), *map(jax.tree.leaves, (norms, sums, stacked)), strict=True
    ):
        flat = leaf.reshape(BATCH, -1) * MASK[:, None]
        name = jax.tree_util.keystr(path)
        sizes = np.linalg.norm(flat, axis=1)
        np.testing.assert_allclose(np.sqrt(norm), sizes, rtol=tolerance, err_msg=name)
        error = np.asarray(total, np.float64).ravel() - WEIGHTS.astype(np.float64) @ flat
        assert np.linalg.norm(error) <= tolerance * np.linalg.norm(flat), name
        error = np.asarray(each, np.float64).reshape(BATCH, -1) - flat
        assert np.linalg.norm(error) <= tolerance * np.linalg.norm(flat), name


def test_explain_names_the_rules():
    rows = {row.leaf: (row.form, row.rule) for row in dpoptax.explain(loss_fn, *model())}
    for name in ("gate", "up", "down"):
        form, rule = rows[f"['layers']['{name}']"]
        assert form == "recomputed"
        assert rule in ("direct, by group", "Gram, by group")
    assert rows["['twice']"][0] in ("factored", "materialized")


def test_another_product_by_groups_falls_back():
    """Contracted along the other axis of the matrices: not the product that the rules are for."""
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )

    def loss(w, x):
        return jnp.sum(jax.lax.ragged_dot_general(x, w, jnp.array([2, 4]), numbers))

    (row,) = dpoptax.explain(loss, jnp.ones((2, 3, WIDTH)), jnp.ones((2, ROWS, WIDTH)))
    assert (row.form, row.rule) == ("stacked", "used by ragged_dot_general")


@pytest.mark.parametrize("sizes", [(2, 4, 1), (0, 7, 0), (3, 0, 2), (9, 9, 9), (-1, 3, 3)])
@pytest.mark.usefixtures("_either_way")
def test_rows_meet_the_matrix_of_their_group(sizes):
    """Whatever the sizes are: a padded row of the batch may hold any."""
    rng = np.random.default_rng(0)
    x, w = np.float32(rng.normal(size=(7, 4))), np.float32(rng.normal(size=(3, 4, 2)))
    groups = np.asarray(_grouped_rows.group_of_rows(jnp.array(sizes), 7))
    expected = [
        row @ w[group] if group < 3 else np.zeros(2) for row, group in zip(x, groups, strict=True)
    ]
    found = _grouped_rows.ragged_product(
        jnp.asarray(x), jnp.asarray(w), jnp.array(sizes), precision="highest", dtype=jnp.float32
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    if min(sizes) >= 0:
        ends = np.cumsum(sizes)
        np.testing.assert_array_equal(groups, [np.sum(ends <= row) for row in range(7)])


def test_sizes_in_a_narrow_type_do_not_overflow():
    groups = _grouped_rows.group_of_rows(jnp.array([200, 200], jnp.uint8), 500)
    np.testing.assert_array_equal(groups, np.repeat([0, 1, 2], [200, 200, 100]))


def experts(w, x):
    """The sizes of the groups follow from the example."""
    sizes = jnp.bincount(jnp.abs(x[:, 0]).astype(jnp.int32) % EXPERTS, length=EXPERTS)
    return jnp.sum(jnp.tanh(jax.lax.ragged_dot(x, w, sizes)))


def layers_of_experts(w, x):
    return jax.lax.scan(lambda c, w: (c, experts(w, x)), 0.0, w)[1].sum()


def shared_by_a_scan(w, x):
    """The scan that slices the layers is inside of the one that shares them."""
    return jax.lax.map(lambda scale: layers_of_experts(w, scale * x), jnp.arange(1.0, 4.0)).sum()


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("loss", "shape"),
    [
        (experts, (EXPERTS, WIDTH, HIDDEN)),
        (shared_by_a_scan, (2, EXPERTS, WIDTH, HIDDEN)),
        pytest.param(layers_of_experts, (2, EXPERTS, WIDTH, HIDDEN), marks=pytest.mark.slow),
    ],
)
def test_the_rules_obey_the_laws(loss, shape, monkeypatch):
    sites, spec = sites_of(loss, shape, jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32))
    rng = np.random.default_rng(0)

    def factors(sites, rows):
        (site,) = sites
        lead = (BATCH, *(scan.length for scan in site.scans))
        sizes = rng.integers(1, 3, (*lead, EXPERTS))
        sizes[0] = 0  # no row of the first example belongs to a group
        a, g = (np.float32(rng.normal(size=(*lead, ROWS, n))) for n in (WIDTH, HIDDEN))
        return [Factors((jnp.asarray(a), jnp.asarray(sizes)), jnp.asarray(g))]

    monkeypatch.setattr("rule_laws.random_factors", factors)
    check_laws(*(rule.matches(sites, spec) for rule in (DirectRagged, GramRagged)))


def used_twice(w, x):
    return experts(w, x) + experts(w, jnp.sin(x))


def repeated(w, x):
    return experts(jnp.broadcast_to(w, (EXPERTS, WIDTH, HIDDEN)), x)


@pytest.mark.parametrize(
    ("loss", "shape"),
    [
        (used_twice, (EXPERTS, WIDTH, HIDDEN)),
        (repeated, (WIDTH, HIDDEN)),
        (lambda w, x: jnp.sum(x @ w), (WIDTH, HIDDEN)),
    ],
)
def test_other_uses_are_refused(loss, shape):
    sites, spec = sites_of(loss, shape, jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32))
    assert DirectRagged.matches(sites, spec) is None
    assert GramRagged.matches(sites, spec) is None


def test_grams_are_cheaper_for_few_rows_and_products_for_many():
    def rule(rows):
        example = jax.ShapeDtypeStruct((rows, 64), jnp.float32)
        use = sites_of(experts, (EXPERTS, 64, 64), example)
        return min(
            (kind.matches(*use) for kind in (DirectRagged, GramRagged)), key=lambda one: one.cost
        ).name

    assert rule(8) == "Gram, by group"
    assert rule(1024) == "direct, by group"
