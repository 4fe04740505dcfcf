"""The mean loss over random views of an example: its gradients in every form, and its privacy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from architectures import ARCHITECTURES, floats
from flax import nnx
from test_ragged_dot import loss_fn as experts_loss
from test_ragged_dot import model as experts_model

import dpoptax

slow = pytest.mark.slow
BATCH, VIEWS, CLIP = 5, 3, 0.5
MASK = np.array([True, True, False, True, True])
WEIGHTS = np.float32([0.3, 0.7, 0.5, 2.0, 1.0])
FORMS = {
    "factored": {"form": "factored"},
    "recomputed": {"form": "recomputed"},
    "microbatched": {"microbatch_size": 2},
}
# The others take longer to compile.
QUICK = ("linen mlp",)


def shaken(key, example):
    """Noise on floats, and some ids replaced by zero."""

    def change(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf + 0.3 * jax.random.normal(key, leaf.shape, leaf.dtype)
        return jnp.where(jax.random.bernoulli(key, 0.3, leaf.shape), 0, leaf).astype(leaf.dtype)

    return jax.tree.map(change, example)


def experts(batch):
    params, examples = experts_model()
    return experts_loss, params, examples[:batch]


def models(names):
    known = {**ARCHITECTURES, "experts": experts}
    return [pytest.param(known[name], id=name) for name in names]


OTHERS = (
    "switch", "nnx convolution", "linen wide convolution", "linen embedding",
    "linen tied embedding", "linen attention", "experts",
)  # fmt: skip
LONGEST = ("linen convolutions", "nnx gru", "decoder")


def marked(names, mark):
    return [pytest.param(*case.values, id=case.id, marks=mark) for case in models(names)]


@pytest.mark.seconds
@pytest.mark.parametrize(
    "make", [*models(QUICK), *marked(OTHERS, slow), *marked(LONGEST, pytest.mark.nightly)]
)
def test_every_form_gives_the_gradient_of_the_mean_over_the_views(make):
    """Also beside a padded row of NaN: law 3. All forms give one sum: laws 2 and 9."""
    with jax.numpy_dtype_promotion("standard"):
        loss_fn, params, examples = make(BATCH)
        loss = dpoptax.average_views(loss_fn, shaken, VIEWS)
        key = jax.random.key(1)

        @jax.jit
        def program(params, examples, padded):
            keys = jax.random.split(key, BATCH)
            # One example after the other: JAX has no `vmap` of experts.
            exact = jax.lax.map(lambda one: jax.grad(loss)(params, *one), (examples, keys))
            found = {}
            for name, options in FORMS.items():
                grads_fn = dpoptax.per_example_grads(loss, allow_unused=True, **options)
                grads = grads_fn(params, padded, mask=MASK, key=key)
                found[name] = grads.squared_norms(), grads.weighted_sum(jnp.asarray(WEIGHTS))
            return exact, found

        def poisoned(leaf):
            return leaf.at[2].set(jnp.nan) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

        exact, found = program(params, examples, jax.tree.map(poisoned, examples))
    exact = [np.asarray(leaf, np.float64).reshape(BATCH, -1) for leaf in jax.tree.leaves(exact)]
    whole = sum(np.sum(leaf**2, axis=1) for leaf in exact)
    for norms, sums in found.values():
        for leaf, norm, total in zip(exact, *map(jax.tree.leaves, (norms, sums)), strict=True):
            squares = np.sum(leaf**2, axis=1) * MASK
            np.testing.assert_allclose(norm, squares, rtol=3e-5, atol=1e-6 * whole.max())
            error = np.ravel(total) - (WEIGHTS * MASK).astype(np.float64) @ leaf
            assert np.linalg.norm(error) <= 3e-5 * np.sqrt(whole.max())


@pytest.mark.parametrize(
    "names",
    [
        ("linen mlp", "nnx convolution", "linen tied embedding", "switch", "experts", "nnx gru"),
        pytest.param((*ARCHITECTURES, "experts"), marks=slow),
    ],
    ids=["some", "all"],
)
def test_no_leaf_that_has_a_norm_rule_is_stacked_with_views(names):
    for (make,) in (case.values for case in models(names)):
        with jax.numpy_dtype_promotion("standard"):
            loss_fn, params, examples = make(BATCH)
            alone = dpoptax.explain(loss_fn, params, examples)
            loss = dpoptax.average_views(loss_fn, shaken, VIEWS)
            averaged = dpoptax.explain(loss, params, examples, key=jax.random.key(0))
        for before, after in zip(alone, averaged, strict=True):
            if before.form != "stacked":
                assert after.form != "stacked", after
                assert after.source == before.source  # the user's line


def views_of(num_views, *, keep_original=False):
    """The views of the example (0, 1, 2), and the keys that the loss got for them."""
    rows = []

    def loss_fn(params, view, key):
        jax.debug.callback(lambda *row: rows.append(row), view, jax.random.key_data(key))
        return jnp.sum(params * view), {"first": view[0], "positive": view > 0}

    def augment(key, example):
        return example + jax.random.normal(key, example.shape)

    loss = dpoptax.average_views(loss_fn, augment, num_views, keep_original=keep_original)
    value, aux = loss(jnp.ones(3), jnp.arange(3.0), jax.random.key(3))
    jax.effects_barrier()
    views = np.array([view for view, _ in rows])
    np.testing.assert_allclose(value, views.sum(1).mean(), rtol=1e-6)
    np.testing.assert_allclose(aux["first"], views[:, 0].mean(), rtol=1e-6)
    np.testing.assert_allclose(aux["positive"], (views > 0).mean(0), rtol=1e-6)
    return views, [tuple(np.asarray(key).tolist()) for _, key in rows]


def test_each_view_has_its_own_noise_and_each_loss_its_own_key():
    views, keys = views_of(4)
    assert len(np.unique(views - np.arange(3.0))) == 12
    assert len(set(keys)) == 4


def test_the_first_view_may_be_the_example_itself():
    views, keys = views_of(4, keep_original=True)
    assert len(set(keys)) == 4
    assert [np.array_equal(view, np.arange(3.0)) for view in views].count(True) == 1
    assert np.array_equal(views_of(1, keep_original=True)[0], [np.arange(3.0)])


def steep(params, view):
    """All views have nearly the same gradient, far beyond the clip bound."""
    return jnp.sum(100 * params["w"] @ view) + 100 * params["b"]


def moved_by_the_last_example(loss, examples, num_views, **options):
    """The distance between the clipped sums with and without the last example and its views."""
    params, num_rows = {"w": jnp.ones((4, 3)), "b": jnp.zeros(())}, len(examples)
    grads_fn = dpoptax.per_example_grads(loss, **options)

    @jax.jit
    def clipped_sum(mask):
        grads = grads_fn(params, examples, mask=mask, key=jax.random.key(2))
        return grads.clip_and_sum(dpoptax.clipping.FlatClip(CLIP).weights)

    rows = np.arange(num_rows)
    sums = [clipped_sum(rows < num_rows - left_out) for left_out in (0, num_views)]
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, *sums)))


@pytest.mark.parametrize(
    "form",
    [
        "factored",
        *(pytest.param(form, marks=slow) for form in ("recomputed", "microbatched", "stacked")),
    ],
)
def test_an_example_moves_the_sum_by_the_clip_bound_however_many_views_it_has(form):
    """Law 7."""
    options, examples = FORMS.get(form, {"form": "stacked"}), 5 + floats(3, 3)
    loss = dpoptax.average_views(steep, lambda key, x: x + jax.random.normal(key, x.shape), VIEWS)
    np.testing.assert_allclose(
        moved_by_the_last_example(loss, examples, 1, **options), CLIP, rtol=1e-4
    )


def test_views_that_are_examples_of_their_own_move_the_sum_further():
    """So the test above has power."""
    views = jnp.repeat(5 + floats(3, 3), VIEWS, axis=0)
    moved = moved_by_the_last_example(lambda params, x, key: steep(params, x), views, VIEWS)
    assert moved > (VIEWS - 0.1) * CLIP


@slow
def test_views_in_fit_and_in_a_loop_of_ones_own():
    """A model of NNX that draws masks; microbatches and a loop make the same steps."""
    model = nnx.Sequential(
        nnx.Dropout(0.5, rngs=nnx.Rngs(1)), nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    )  # fmt: skip
    of_view, params = dpoptax.nnx.loss_fn(model, lambda model, x: jnp.mean(model(x) ** 2))
    loss = dpoptax.average_views(of_view, shaken, 2, keep_original=True)
    plan = dpoptax.Plan(
        sampler=dpoptax.samplers.Poisson(20, 8), clip=1.0, noise_multiplier=1.0, num_steps=2,
        delta=1e-3,
    )  # fmt: skip
    arguments = loss, params, floats(20, 3)
    options = {"plan": plan, "optimizer": optax.sgd(0.1), "key": jax.random.key(5)}
    result = dpoptax.training.fit(*arguments, **options, microbatch_size=2, progress=False)
    run = dpoptax.training.PrivateRun(*arguments, **options)
    assert sum(1 for _ in run) == result.num_steps == 2
    assert run.epsilon() == result.epsilon() == plan.epsilon()
    for leaf, other in zip(*map(jax.tree.leaves, (result.params, run.params)), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-6)


def mean_square(params, x):
    return jnp.mean((params * x) ** 2)


def grads_with_views(loss_fn=mean_square, augment=shaken, num_views=2, **options):
    loss = dpoptax.average_views(loss_fn, augment, num_views, **options)
    return dpoptax.per_example_grads(loss)(jnp.ones(3), jnp.ones((4, 3)), key=jax.random.key(0))


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "num_views must be at least 1; got 0", {"num_views": 0}),
        (TypeError, "num_views must be a whole number", {"num_views": 2.0}),
        (TypeError, "augment must be a function", {"augment": None}),
        (TypeError, "loss_fn must take", {"loss_fn": lambda params: 0.0}),
        (ValueError, "structure of the example", {"augment": lambda key, x: (x, x)}),
        (ValueError, "structure of the example", {"augment": lambda key, x: None}),
        (ValueError, r"shapes of the example .* got \(2,\)", {"augment": lambda key, x: x[:2]}),
        (TypeError, r"called with \(key, example\); got one that takes \(x\)",
         {"augment": lambda x: x}),
        (TypeError, r"the key first; got one that takes \(x, rng\)",
         {"augment": lambda x, rng: x}),
        (TypeError, "must return arrays; got 'image'", {"augment": lambda key, x: "image"}),
        (
            TypeError,
            "keep the dtypes of the example; got float16",
            {"augment": lambda key, x: x.astype("float16"), "keep_original": True},
        ),
        (ValueError, r"scalar, the loss of one example; got shape \(3,\)",
         {"loss_fn": lambda params, x: params * x}),
        (TypeError, "real floating-point loss; got int32",
         {"loss_fn": lambda params, x: jnp.argmax(params * x)}),
        (ValueError, "got None", {"loss_fn": lambda params, x: None}),
    ],
)  # fmt: skip
def test_bad_views_and_losses_are_refused(error, message, arguments):
    with pytest.raises(error, match=message):
        grads_with_views(**arguments)


def test_a_loss_with_views_needs_a_key():
    loss = dpoptax.average_views(mean_square, shaken, 2)
    with pytest.raises(TypeError, match="pass key="):
        dpoptax.per_example_grads(loss)(jnp.ones(3), jnp.ones((4, 3)))


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(x[None])


def test_statistics_over_the_views_are_refused_like_those_over_a_batch():
    model = Normalized()
    params = {"scale": jnp.ones(3), "bias": jnp.zeros(3)}

    def loss_fn(params, x):
        stats = {"BatchNorm_0": {"mean": jnp.zeros(3), "var": jnp.ones(3)}}
        variables = {"params": {"BatchNorm_0": params}, "batch_stats": stats}
        return jnp.sum(model.apply(variables, x, mutable=["batch_stats"])[0])

    loss = dpoptax.average_views(loss_fn, shaken, 2)
    with pytest.raises(ValueError, match="BatchNorm"):
        dpoptax.per_example_grads(loss)(params, jnp.ones((4, 3)), key=jax.random.key(0))
