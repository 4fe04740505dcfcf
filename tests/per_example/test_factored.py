"""Factored gradients against `vmap(grad)`, model by model."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import ARCHITECTURES, by_leaf, floats

import dpoptax

slow, nightly = pytest.mark.slow, pytest.mark.nightly
# These take longest to compile, and use the same rules as smaller models that stay.
LONG_TO_COMPILE = (
    "linen convolutions",
    "linen attention",
    "linen lstm",
    "linen concatenated lstm",
    "linen gru",
    "linen 3-d convolution",
    "nnx gru",
    "nnx text",
    "haiku lstm",
    "equinox convolutions",
    "decoder",
)
architectures = pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=name, marks=slow if name in LONG_TO_COMPILE else ())
        for name, make in ARCHITECTURES.items()
    ],
)
OPTIONS = {
    "factored": {},
    "recomputed": {"form": "recomputed"},
    "stacked": {"form": "stacked"},
    "microbatched": {"microbatch_size": 2},
}


@contextlib.contextmanager
def nothing_held():
    """Small models hold the gradients of most leaves: here the rules work from factors alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpoptax.per_example._factored, "is_materialized", lambda *_: False)
        yield


def compare(loss_fn, params, examples, mask=None, settings=(contextlib.nullcontext,)):
    """Norms to 1e-5 relative, and the weighted sum to 1e-5 of its norm, under every setting.

    Each leaf has weights of its own.
    """
    batch = jax.tree.leaves(examples)[0].shape[0]
    rows = np.ones(batch, bool) if mask is None else np.asarray(mask)
    weights = np.random.default_rng(3).uniform(0.1, 1.0, batch).astype(np.float32)

    @jax.jit
    def program(params, examples, clean):
        # One program for all of it: XLA compiles what they have in common, the model, only once.
        exact = jax.vmap(jax.grad(loss_fn), (None, 0))(params, clean)
        found = []
        for setting in settings:
            with setting():
                grads_fn = dpoptax.per_example_grads(loss_fn, allow_unused=True)
                grads = grads_fn(params, examples, mask=mask)
                sums = grads.weighted_sum(by_leaf(weights, params))
                found.append((grads.squared_norms(), sums, grads.stacked()))
        return exact, found

    def cleaned(leaf):
        leaf = np.array(leaf)
        leaf[~rows] = 0
        return leaf

    exact, found = program(params, examples, jax.tree.map(cleaned, examples))
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64)[rows], exact)
    for norms, total, stacked in found:
        check(norms, total, stacked, exact=exact, rows=rows, weights=weights)


def check(norms, total, stacked, *, exact, rows, weights):
    leaves = jax.tree.leaves(exact)
    exact_norms = [np.sum(leaf**2, axis=tuple(range(1, leaf.ndim))) for leaf in leaves]
    whole = np.maximum(sum(exact_norms), 1e-12)
    for norm, expected in zip(jax.tree.leaves(norms), exact_norms, strict=True):
        np.testing.assert_array_equal(np.asarray(norm)[~rows], 0)
        error = np.abs(np.asarray(norm, np.float64)[rows] - expected)
        assert np.all(error <= 2e-5 * expected + 1e-7 * whole)
    expected = jax.tree.map(
        lambda factors, leaf: np.tensordot(np.asarray(factors, np.float64)[rows], leaf, 1),
        by_leaf(weights, exact),
        exact,
    )
    size = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(expected)))
    error = jax.tree.map(lambda a, b: np.sum((np.asarray(a, np.float64) - b) ** 2), total, expected)
    assert np.sqrt(sum(jax.tree.leaves(error))) <= 1e-5 * size
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a)[rows], b, rtol=1e-4, atol=1e-5 * np.abs(b).max(initial=0)
        ),
        stacked,
        exact,
    )


@architectures
def test_norms_and_sums_are_those_of_vmap_grad(make):
    """As the cost model chooses, and from factors alone."""
    with jax.numpy_dtype_promotion("standard"):  # Flax itself mixes dtypes in places
        compare(*make(5), settings=(contextlib.nullcontext, nothing_held))


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [1, 1000])
@pytest.mark.parametrize(
    "name", ["linen convolutions", "linen embedding", "linen tied embedding", "nested grad"]
)
def test_norms_and_sums_are_right_however_the_batch_is_cut_into_chunks(name, numbers, monkeypatch):
    cost_model = dpoptax.per_example._norm_rules.cost_model
    monkeypatch.setattr(cost_model, "CPU", cost_model.CPU._replace(chunk_floats=numbers))
    monkeypatch.setattr(dpoptax.per_example._factored, "is_materialized", lambda *_: False)
    with jax.numpy_dtype_promotion("standard"):
        compare(*ARCHITECTURES[name](5))


@pytest.mark.slow
@pytest.mark.parametrize(
    "batch", [0, 1, pytest.param(2, marks=nightly), 7, pytest.param(64, marks=nightly)]
)
@pytest.mark.parametrize("name", ["linen mlp over time", "linen convolutions", "nnx text"])
def test_norms_and_sums_are_right_for_any_batch_size(name, batch):
    with jax.numpy_dtype_promotion("standard"):
        compare(*ARCHITECTURES[name](batch))


@pytest.mark.parametrize(
    "name",
    [
        "linen mlp over time",
        *(pytest.param(n, marks=slow) for n in ("linen wide convolution", "nnx text")),
    ],
)
def test_no_clipped_gradient_leaves_the_ball_by_more_than_rounding(name):
    with jax.numpy_dtype_promotion("standard"):
        loss_fn, params, examples = ARCHITECTURES[name](16)
        grads = jax.jit(dpoptax.per_example_grads(loss_fn))(params, examples)
        weights = dpoptax.clipping.FlatClip(1e-3).weights(grads.squared_norms())
        exact = jax.jit(jax.vmap(jax.grad(loss_fn), (None, 0)))(params, examples)
    leaves = [np.asarray(leaf, np.float64).reshape(16, -1) for leaf in jax.tree.leaves(exact)]
    norms = np.linalg.norm(np.concatenate(leaves, axis=1), axis=1)
    assert np.all(norms > 1e-3)  # every one is clipped
    assert np.all(np.asarray(weights, np.float64) * norms <= 1e-3 * (1 + 1e-5))


def product_of(w, x):
    return x.reshape(16, 256) @ w


def convolution_of(w, x):
    image, kernel = x.reshape(1, 4, 4, 256), w.reshape(1, 1, 256, 256)
    numbers = ("NHWC", "HWIO", "NHWC")
    output = jax.lax.conv_general_dilated(image, kernel, (1, 1), "VALID", dimension_numbers=numbers)
    return output.reshape(16, 256)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "rule"), [(product_of, "Gram"), (convolution_of, "pixel Gram")])
def test_a_gradient_far_smaller_than_its_factors_stays_in_the_ball_too(model, rule):
    """Each is a sum of 16 rows that cancel but for a part of 3e-5, of which a Gram loses sight."""
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(32, 1, 256)), 16, axis=1)
    c = rng.normal(size=(32, 16, 256))
    c += 1e-5 * rng.normal(size=(32, 1, 256)) - c.mean(axis=1, keepdims=True)
    x, c = x.astype(np.float32), c.astype(np.float32)

    def loss_fn(w, example):
        x, c = example
        return jnp.sum(model(w, x) * c)

    w = jnp.ones((256, 256))
    (leaf,) = dpoptax.explain(loss_fn, w, (x, c))
    assert (leaf.form, leaf.rule) == ("factored", rule)
    grads = dpoptax.per_example_grads(loss_fn)(w, (x, c))
    exact = np.einsum("btk,btn->bkn", x.astype(np.float64), c.astype(np.float64))
    norms = np.linalg.norm(exact.reshape(32, -1), axis=1)
    l2_clip = 0.3 * norms.min()
    weights = dpoptax.clipping.FlatClip(l2_clip).weights(grads.squared_norms())
    assert np.all(np.asarray(weights, np.float64) * norms <= l2_clip * (1 + 1e-5))


@functools.cache
def clipped_sum(loss_fn):
    """Compiled once per number of rows: the sizes that a test goes through are arguments."""
    rule = dpoptax.clipping.FlatClip(1.0)
    return jax.jit(
        lambda w, examples: dpoptax.per_example_grads(loss_fn)(w, examples).clip_and_sum(
            rule.weights
        )
    )


def weighted_bag(w, example):
    ids, scales = example
    return jnp.sum(scales[:, None] * w[ids])


def weighted_pairs(w, example):
    ids, scales = example
    return jnp.sum(scales * w[ids, ids])


def weighted_product(w, example):
    x, scales = example
    return jnp.sum(scales[:, None] * (x @ w))


def weighted_patches(w, example):
    x, scales = example
    kernel = w.reshape(5, 8, 8)
    numbers = ("NWC", "WIO", "NWC")
    output = jax.lax.conv_general_dilated(x[None], kernel, (1,), "SAME", dimension_numbers=numbers)
    return jnp.sum(scales[:, None] * output[0])


def used_twice(w, example):
    x, scales = example
    return jnp.sum(scales[:, None] * (x @ w)) + jnp.sum(scales[:, None] * (x @ w.T))


@pytest.mark.slow
@pytest.mark.parametrize("size", [1e4, 1e10, 1e30])
@pytest.mark.parametrize(
    ("loss_fn", "shape", "x", "rules"),
    [
        (weighted_bag, (500, 4), np.zeros((9, 64), int), {"segments"}),
        (weighted_product, (8, 8), np.ones((9, 64, 8)), {"direct"}),
        (weighted_product, (300, 300), np.ones((9, 64, 300)), {"Gram", "direct"}),
        (weighted_patches, (40, 8), np.ones((9, 64, 8)), {"patches", "direct"}),
        (used_twice, (8, 8), np.ones((9, 64, 8)), {"direct"}),
    ],
    ids=["lookup", "product", "large product", "convolution", "twice"],
)
def test_terms_that_cancel_in_one_example_wipe_out_no_others(
    loss_fn, shape, x, rules, size, monkeypatch
):
    """The last example is the difference of large terms: its own gradient may be lost."""
    monkeypatch.setattr(dpoptax.per_example._factored, "is_materialized", lambda *_: False)
    small = np.random.default_rng(0).normal(size=64)
    large = size * np.tile([1, -1], 32)
    scales = np.asarray([*[small] * 8, large], np.float32)
    examples = (jnp.asarray(x, jnp.asarray(x).dtype), jnp.asarray(scales))
    w = jnp.zeros(shape)
    assert {row.rule for row in dpoptax.explain(loss_fn, w, examples)} <= rules

    def clipped(rows):
        return clipped_sum(loss_fn)(w, jax.tree.map(lambda leaf: leaf[rows], examples))

    without = clipped(slice(0, 8))
    assert np.linalg.norm(without) == pytest.approx(8, rel=1e-3)
    assert np.linalg.norm(clipped(slice(0, 9)) - without) <= 1.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss_fn", "shape"),
    [(weighted_bag, (500, 4)), (weighted_pairs, (300, 300))],
    ids=["rows", "numbers"],
)
@pytest.mark.parametrize("tokens", [2**12, 2**16])  # without the bound, .05 and .5
def test_sums_on_the_way_to_nothing_wipe_out_no_others(tokens, loss_fn, shape, monkeypatch):
    """Half of the terms of the last example go up and the other half down, to exactly zero."""
    monkeypatch.setattr(dpoptax.per_example._factored, "is_materialized", lambda *_: False)
    rng = np.random.default_rng(0)
    up = rng.integers(256, 512, tokens // 2)
    hill = np.concatenate([up, -rng.permutation(up)])
    small = rng.normal(size=tokens)
    scales = jnp.asarray(np.asarray([*[small] * 8, hill], np.float32))
    w = jnp.zeros(shape)

    def clipped(rows):
        return clipped_sum(loss_fn)(w, (jnp.zeros((rows, tokens), int), scales[:rows]))

    without = clipped(8)
    assert np.linalg.norm(without) == pytest.approx(8, rel=5e-3)
    # Its own gradient is zero: what moves the sum is what it did to the others.
    assert np.linalg.norm(clipped(9) - without) <= 1 / 32


@pytest.mark.parametrize(
    "name",
    ["nnx mlp", *(pytest.param(name, marks=slow) for name in LONG_TO_COMPILE[:3])],
)
def test_padded_rows_may_hold_anything(name):
    with jax.numpy_dtype_promotion("standard"):
        loss_fn, params, examples = ARCHITECTURES[name](6)
        mask = jnp.array([True, False, True, True, False, True])
        compare(loss_fn, params, examples.at[1].set(jnp.nan).at[4].set(jnp.inf), mask)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "form"),
    [
        # One loop over stacked gradients or microbatches is that of every model.
        pytest.param(
            name, form, marks=() if number == 0 or form in ("factored", "recomputed") else nightly
        )
        for number, name in enumerate(
            (
                "linen attention",
                "linen convolutions",
                "linen lstm",
                "standardised convolution",
                "a convolution of two activations",
                "a convolution with weight decay",
                "a convolution by two kernels joined",
                "a cond that holds a convolution",
            )
        )
        for form in OPTIONS
    ],
)
def test_a_row_of_nan_has_no_norm_and_adds_nothing(name, form):
    with jax.numpy_dtype_promotion("standard"):
        loss_fn, params, examples = ARCHITECTURES[name](4)
        grads_fn = dpoptax.per_example_grads(loss_fn, **OPTIONS[form])
        rule = dpoptax.clipping.FlatClip(1.0)

        @jax.jit
        def weights_and_sum(examples, mask):
            grads = grads_fn(params, examples, mask=mask)
            return rule.weights(grads.squared_norms()), grads.clip_and_sum(rule.weights)

        everyone, others = jnp.ones(4, bool), jnp.arange(4) != 2
        weights, poisoned = weights_and_sum(examples.at[2].set(jnp.nan), everyone)
        expected, total = weights_and_sum(examples, others)
        np.testing.assert_allclose(weights, jnp.where(others, expected, 0), rtol=1e-5)
        assert np.all(expected[others] > 0)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), poisoned, total
        )


@functools.cache
def readings_of_an_mlp(form, microbatch_size):
    loss_fn, params, examples = ARCHITECTURES["linen mlp"](7)
    rule = dpoptax.clipping.FlatClip(0.3)
    grads_fn = dpoptax.per_example_grads(loss_fn, form=form, microbatch_size=microbatch_size)

    @jax.jit
    def readings(params, examples):
        grads = grads_fn(params, examples, mask=jnp.arange(7) != 3)
        return (
            grads.squared_norms(), grads.clip_and_sum(rule.weights),
            grads.weighted_sum(jnp.arange(7.0)), grads.stacked(),
        )  # fmt: skip

    return readings(params, examples)


@pytest.mark.slow
@pytest.mark.parametrize(
    "size", [1, pytest.param(2, marks=nightly), 3, pytest.param(7, marks=nightly), 100]
)
@pytest.mark.parametrize("form", ["factored", "recomputed", "stacked"])
def test_micro_batches_of_any_size_give_the_same_norms_and_sums(size, form):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        readings_of_an_mlp(form, size),
        readings_of_an_mlp(form, None),
    )


def test_micro_batched_losses_keys_and_closures_are_those_of_the_whole_batch():
    @jax.jit
    def run(scale, x):
        def loss_fn(w, x, key):
            return jnp.sum(jnp.tanh(x @ w) * jax.random.normal(key, (3,))) * scale

        def both(**options):
            fn = dpoptax.value_and_per_example_grads(loss_fn, **options)
            losses, grads = fn(jnp.ones((4, 3)), x, key=jax.random.key(5))
            return losses, grads.weighted_sum(jnp.ones(5))

        return both(microbatch_size=2), both()

    parts, whole = run(2.0, floats(5, 4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), parts, whole)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["factored", "recomputed", "stacked"])
def test_microbatches_of_padding_alone_are_not_worked_through(form):
    seen = []

    def loss_fn(w, x):
        jax.debug.callback(lambda x: seen.append(round(10 * float(x[0]))), x)
        return jnp.sum(jnp.tanh(x @ w))

    @jax.jit
    def run(x, mask):
        options = {"form": form, "microbatch_size": 2}
        fn = dpoptax.value_and_per_example_grads(loss_fn, **options)
        losses, grads = fn(jnp.ones((4, 3)), x, mask=mask)
        return losses, grads.weighted_sum(jnp.ones(7)), grads.squared_norms()

    x = 0.1 * floats(7, 4).at[:, 0].set(jnp.arange(7.0))
    places = {}
    for name, mask in {
        "all": jnp.ones(7, bool), "one": jnp.arange(7) == 4, "none": jnp.zeros(7, bool)
    }.items():  # fmt: skip
        seen.clear()
        losses, total, squared = jax.block_until_ready(run(x, mask))
        jax.effects_barrier()
        places[name] = set(seen)
        whole = jax.vmap(jax.grad(lambda w, x: jnp.sum(jnp.tanh(x @ w))), (None, 0))(
            jnp.ones((4, 3)), x
        )
        expected = jnp.where(mask[:, None, None], whole, 0.0)
        np.testing.assert_allclose(total, expected.sum(0), rtol=1e-5)
        np.testing.assert_allclose(squared, jnp.square(expected).sum((1, 2)), rtol=1e-5)
        assert not jnp.any(jnp.where(mask, 0.0, losses))
    assert places == {"all": set(range(7)), "one": {4, 5}, "none": set()}


@pytest.mark.slow
@pytest.mark.parametrize("jit", [True, False])
def test_the_self_check_passes_what_is_right_and_refuses_what_is_not(jit, monkeypatch):
    def run(examples):
        grads_fn = dpoptax.per_example_grads(lambda w, x: jnp.sum(jnp.tanh(x @ w)), check=True)
        return grads_fn(jnp.ones((40, 30)), examples).weighted_sum(jnp.ones(3))

    wrapped = jax.jit(run) if jit else run
    wrapped(floats(3, 40))
    jax.clear_caches()
    rule = dpoptax.per_example._norm_rules.matmul.OuterProduct
    right = rule.squared_norms
    monkeypatch.setattr(rule, "squared_norms", lambda self, factors: 2 * right(self, factors))
    monkeypatch.setattr(dpoptax.per_example._factored, "is_materialized", lambda *_: False)
    with pytest.raises(RuntimeError, match="norms of params"):
        wrapped(floats(3, 40))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_norms_and_sums_of_16_bit_parameters_are_float32(dtype):
    def loss_fn(w, x):
        return jnp.sum((x @ w).astype(jnp.float32) ** 2)

    w, x = floats(8, 300)[:, :1].T.astype(dtype) * 20, 20 * floats(16, 1).astype(dtype)
    grads = dpoptax.per_example_grads(loss_fn)(w, x)
    norms, total = grads.squared_norms(), grads.weighted_sum(jnp.ones(16))
    assert norms.dtype == total.dtype == jnp.float32
    assert np.all(np.isfinite(norms))
    assert float(norms.max()) > 65504  # would overflow float16
    wide_w, wide_x = w.astype(jnp.float32), x.astype(jnp.float32)
    exact = jax.vmap(jax.grad(loss_fn), (None, 0))(wide_w, wide_x)
    np.testing.assert_allclose(norms, jnp.sum(exact**2, (1, 2)), rtol=5e-2)


def test_no_array_of_batch_times_parameters_is_ever_made():
    wide = {"w": jnp.ones((500, 400)), "v": jnp.ones((400, 300))}
    rule = dpoptax.clipping.FlatClip(1.0)

    def clipped(params, examples):
        grads = dpoptax.per_example_grads(
            lambda p, x: jnp.sum(jnp.tanh(jnp.tanh(x @ p["w"]) @ p["v"]))
        )(params, examples)
        return grads.weighted_sum(rule.weights(grads.squared_norms()))

    lowered = jax.jit(clipped).lower(wide, floats(32, 500)).compile()
    held = lowered.memory_analysis().temp_size_in_bytes
    assert held < 4 * 500 * 400 * 4  # a few copies of the parameters, where stacking takes 32


@pytest.mark.slow
def test_losses_that_print_alike_are_told_apart():
    """A jaxpr as text names a custom derivative and does not show it."""

    def scaled(scale):
        @jax.custom_vjp
        def identity(x):
            return x

        identity.defvjp(lambda x: (x, None), lambda _, g: (scale * g,))
        return lambda w, x: identity(jnp.vdot(w, x))

    @jax.jit
    def total(grads):
        return grads.weighted_sum(jnp.ones(4))

    x = floats(4, 3)
    for options in OPTIONS.values():
        once, twice = (
            total(dpoptax.per_example_grads(scaled(scale), **options)(jnp.ones(3), x))
            for scale in (1.0, 2.0)
        )
        np.testing.assert_allclose(2 * once, twice, rtol=1e-6)


def test_a_loss_that_cannot_be_hashed_crosses_jit_in_microbatches():
    @dataclasses.dataclass
    class Loss:
        scale: float

        def __call__(self, w, x):
            return self.scale * jnp.vdot(w, x)

    total = jax.jit(lambda grads: grads.weighted_sum(jnp.ones(4)))
    x = floats(4, 3)
    once, twice = (
        total(dpoptax.per_example_grads(Loss(scale), microbatch_size=2)(jnp.ones(3), x))
        for scale in (1.0, 2.0)
    )
    np.testing.assert_allclose(2 * once, twice, rtol=1e-6)


def test_a_product_over_nothing_has_no_gradient():
    grads = dpoptax.per_example_grads(lambda w, x: jnp.sum(x @ w))(
        jnp.ones((0, 5)), jnp.ones((3, 0))
    )
    np.testing.assert_array_equal(grads.squared_norms(), np.zeros(3))
    assert grads.weighted_sum(jnp.ones(3)).shape == (0, 5)


def test_it_runs_inside_jit_over_traced_constants_and_reuses_the_compiled_function():
    compiled = []

    @jax.jit
    def update(grads):
        compiled.append(1)
        return grads.weighted_sum(jnp.ones(5))

    grads_fn = dpoptax.per_example_grads(lambda w, x: jnp.sum(jnp.tanh(x @ w)))
    for i in range(3):
        update(grads_fn(jnp.full((40, 30), 0.1 * i), floats(5, 40)))
    assert len(compiled) == 1

    @jax.jit
    def with_constant(scale, w, x):
        return dpoptax.per_example_grads(lambda w, x: jnp.sum(jnp.tanh(x @ w) * scale))(
            w, x
        ).weighted_sum(jnp.ones(5))

    once, twice = (with_constant(s, jnp.ones((4, 3)), floats(5, 4)) for s in (1.0, 2.0))
    np.testing.assert_allclose(2 * once, twice, rtol=1e-6)
