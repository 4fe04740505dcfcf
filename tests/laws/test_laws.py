"""The laws of the library, each over every sampler, clip rule and gradient form."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import registry

import dpoptax
from dpoptax.per_example._stacked import as_per_example_grads

# The default form runs while you work, the others before a merge.
forms = pytest.mark.parametrize(
    "form",
    [
        pytest.param(form, id=name, marks=() if name == "factored" else pytest.mark.slow)
        for name, form in registry.FORMS.items()
    ],
)
clip_rules = pytest.mark.parametrize("rule", registry.CLIP_RULES.values(), ids=registry.CLIP_RULES)
# A rule gives one weight per example, or one per group. Where the rule itself does not matter, each
# form runs with one rule of each kind, and each rule with the default form.
forms_and_rules = pytest.mark.parametrize(
    ("form", "rule"),
    [
        pytest.param(
            form, rule, id=f"{of}-{name}", marks=() if of == "factored" else pytest.mark.slow
        )
        for of, form in registry.FORMS.items()
        for name, rule in registry.CLIP_RULES.items()
        if of == "factored" or name in ("flat", "group")
    ],
)
samplers = pytest.mark.parametrize("make", registry.SAMPLERS.values(), ids=registry.SAMPLERS)

ALIASES = {
    "dp_sgd": (dpoptax.dp_sgd, optax.sgd, {}),
    "dp_sgd, momentum": (dpoptax.dp_sgd, optax.sgd, {"momentum": 0.9, "nesterov": True}),
    "dp_adam": (dpoptax.dp_adam, optax.adam, {"b1": 0.8, "b2": 0.99, "eps": 1e-6}),
    "dp_adam_bc": (
        dpoptax.transforms.dp_adam_bc,
        optax.adam,
        {"b1": 0.8, "b2": 0.99, "eps": 1e-6},
    ),
}


def release(grads, params, *, clip=1.0, noise_multiplier=1.0, batch=8, seed=0):
    tx = dpoptax.privatize(
        clip, noise_multiplier, expected_batch_size=batch, key=jax.random.key(seed)
    )
    updates, _ = tx.update(grads, tx.init(params), params)
    return updates


# Compiled once for each form, and not for each rule.
squared_norms = jax.jit(lambda grads: grads.squared_norms())
weighted_sum = jax.jit(lambda grads, weights: grads.weighted_sum(weights))
exact_gradient = jax.jit(jax.grad(registry.loss))


@functools.cache
def compiled(form):
    """Gradients of `registry.loss`, as one program for each shape of the batch."""
    grads_fn = form(registry.loss)
    return jax.jit(lambda params, examples, mask=None: grads_fn(params, examples, mask=mask))


def clipped_sum(grads, rule):
    norms = squared_norms(grads)
    return weighted_sum(grads, jax.tree.broadcast(rule.weights(norms), norms))


@jax.numpy_dtype_promotion("standard")  # optax.adam itself mixes an int32 count with floats
@forms
@pytest.mark.parametrize(
    ("alias", "namesake", "options"),
    [
        pytest.param(*alias, id=name, marks=pytest.mark.slow if "momentum" in name else ())
        for name, alias in ALIASES.items()
    ],
)
def test_law_1_without_clip_and_noise_an_alias_is_its_optax_namesake(
    form, alias, namesake, options
):
    key = jax.random.key(0)
    tx = alias(0.1, math.inf, noise_multiplier=0.0, expected_batch_size=8, key=key, **options)
    check_equal_steps(form, tx, namesake(0.1, **options))


@jax.numpy_dtype_promotion("standard")
@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(name, make, id=f"{name}-{form}", marks=pytest.mark.slow if slow else ())
        for name in registry.OPTIMIZERS
        for form, make in registry.FORMS.items()
        # Only what acts before the clip depends on the form.
        if not (slow := form != "factored") or "scale" in name
    ],
)
def test_law_1_without_clip_and_noise_an_optimizer_is_its_optax_namesake(name, form):
    make, namesake = registry.OPTIMIZERS[name]
    private = dpoptax.privatize(math.inf, 0.0, expected_batch_size=8, key=jax.random.key(0))
    check_equal_steps(form, dpoptax.transforms.chain(private, make(0.1)), namesake(0.1))


def check_equal_steps(form, tx, plain):
    params, examples = registry.params(), registry.examples(8)

    def mean_loss(params):
        return jax.vmap(registry.loss, (None, 0))(params, examples).mean()

    @jax.jit
    def step(params, state):
        point = params
        if getattr(tx, "gradient_point", None) is not None:
            point = tx.gradient_point(params, state)
        updates, state = tx.update(form(registry.loss)(point, examples), state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def plain_step(params, state):
        updates, state = plain.update(jax.grad(mean_loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    private_params, plain_params = params, params
    state, plain_state = tx.init(params), plain.init(params)
    for _ in range(5):
        private_params, state = step(private_params, state)
        plain_params, plain_state = plain_step(plain_params, plain_state)
    moved = registry.distance(plain_params, params)
    assert moved > 0.1
    assert registry.distance(private_params, plain_params) < 1e-5 * moved


@forms
@clip_rules
@pytest.mark.parametrize(
    "batch", [*(pytest.param(b, marks=pytest.mark.slow) for b in (1, 2, 7)), 64]
)
def test_law_2_every_form_gives_the_clipped_sum_of_a_plain_loop(form, rule, batch):
    params, examples = registry.params(), registry.examples(batch)
    gradients = []
    for i in range(batch):
        gradient = exact_gradient(params, jax.tree.map(lambda leaf, i=i: leaf[i], examples))
        gradients.append(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), gradient))
    squares = jax.tree.map(lambda *leaves: np.array([np.sum(g**2) for g in leaves]), *gradients)
    norms = np.sqrt(sum(jax.tree.leaves(squares)))
    clip = rule(float(np.median(norms)))  # both branches of the clip are exercised
    # What the weights are is tested for each rule in tests/clipping.
    weights = clip.weights(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), squares))
    weights = jax.tree.broadcast(weights, params)
    expected = jax.tree.map(
        lambda scales, *leaves: jnp.asarray(
            sum(s * leaf for s, leaf in zip(np.asarray(scales), leaves, strict=True)), jnp.float32
        ),
        weights,
        *gradients,
    )
    actual = clipped_sum(compiled(form)(params, examples), clip)
    assert registry.distance(actual, expected) < 1e-5 * registry.global_norm(expected)


PADDED = jnp.array([True, False, True, True, False, True, True, True])


@functools.cache
def grads_with_padding(form, filler):
    params, (x, y) = registry.params(), registry.examples(6)
    grads_fn, rows = compiled(form), jnp.flatnonzero(PADDED)
    padded_x = jnp.full((8, 5), filler).at[rows].set(x)
    padded_y = jnp.full((8, 3), filler).at[rows].set(y)
    return grads_fn(params, (x, y)), grads_fn(params, (padded_x, padded_y), mask=PADDED)


@forms
@clip_rules
@pytest.mark.parametrize("filler", [0.0, 1e30, math.inf, -math.inf, math.nan])
def test_law_3_padding_never_changes_the_sum(form, rule, filler):
    plain, padded = grads_with_padding(form, filler)
    expected, actual = clipped_sum(plain, rule(1.0)), clipped_sum(padded, rule(1.0))
    assert registry.distance(actual, expected) <= 1e-6 * registry.global_norm(expected)
    for leaf in jax.tree.leaves((squared_norms(padded), padded.stacked())):
        np.testing.assert_array_equal(leaf[~np.asarray(PADDED)], 0)


@forms_and_rules
@pytest.mark.parametrize("poison", [math.inf, math.nan, 3e38])
def test_law_4_an_example_with_a_non_finite_gradient_contributes_zero(form, rule, poison):
    params, (x, y) = registry.params(), registry.examples(6)
    grads_fn = compiled(form)
    poisoned = grads_fn(params, (x.at[2].set(poison), y.at[2].set(poison)))
    others = grads_fn(params, (x, y), mask=jnp.arange(6) != 2)
    norms = jax.tree.leaves(squared_norms(poisoned))
    assert not np.isfinite(sum(float(leaf[2]) for leaf in norms))
    expected = clipped_sum(others, rule(1.0))
    actual = clipped_sum(poisoned, rule(1.0))
    assert registry.distance(actual, expected) <= 1e-6 * registry.global_norm(expected)
    for leaf in jax.tree.leaves(release(poisoned, params, clip=rule(1.0))):
        assert np.all(np.isfinite(leaf))


@forms_and_rules
@pytest.mark.parametrize("batch", [0, 8])
def test_law_5_an_empty_batch_releases_pure_noise(form, rule, batch):
    params = registry.params()
    grads = compiled(form)(params, registry.examples(batch), mask=jnp.zeros(batch, bool))
    actual = release(grads, params, clip=rule(2.0))
    zeros = jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape)), params)
    noise_alone = release(zeros, params, clip=rule(2.0))
    for leaf, expected in zip(jax.tree.leaves(actual), jax.tree.leaves(noise_alone), strict=True):
        np.testing.assert_array_equal(leaf, expected)
        assert np.all(leaf != 0)


@forms_and_rules
def test_law_6_sum_noise_divide_by_a_public_constant(form, rule):
    params, examples = registry.params(), registry.examples(8)
    clip = rule(0.5)
    zeros = jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape)), params)
    noise = jax.tree.map(lambda n: n * 32, release(zeros, params, clip=clip, batch=32))
    for real in (0, 1, 5, 8):  # the realised batch size divides nothing and scales no noise
        grads = compiled(form)(params, examples, mask=jnp.arange(8) < real)
        expected = jax.tree.map(lambda s, n: (s + n) / 32, clipped_sum(grads, clip), noise)
        actual = release(grads, params, clip=clip, batch=32)
        assert registry.distance(actual, expected) < 1e-6 * registry.global_norm(expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_law_6_sums_and_noise_are_float32_whatever_the_parameters_are(dtype):
    # In bfloat16 a running sum of ones stops at 256; in float16 the square of 300 overflows.
    grads = {"w": jnp.ones((4096, 2), dtype), "b": jnp.full((4096, 1), 300, dtype)}
    params = {"w": jnp.zeros(2, dtype), "b": jnp.zeros(1, dtype)}
    tx = dpoptax.privatize(400.0, 0.0, expected_batch_size=4096, key=jax.random.key(0))
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert updates["w"].dtype == dtype
    np.testing.assert_array_equal(updates["w"].astype(jnp.float32), 1.0)
    np.testing.assert_array_equal(updates["b"].astype(jnp.float32), 300.0)
    # Neither bfloat16 nor float16 holds the number 2049.
    ones = as_per_example_grads(jnp.ones((2049, 1), dtype))
    total = dpoptax.mechanisms.Gaussian().release(
        jax.random.key(0), ones, dpoptax.clipping.FlatClip(1.0), 0.0, 0
    )
    assert total.dtype == jnp.float32
    np.testing.assert_array_equal(total, 2049.0)
    # Noise drawn in 16 bits takes few values, so it is drawn in float32 as for a float32 model.
    narrow, wide = (
        dpoptax.mechanisms.Gaussian().release(
            jax.random.key(0),
            as_per_example_grads(jnp.zeros((1, 20_000), of)),
            dpoptax.clipping.FlatClip(1.0),
            1.0,
            0,
        )
        for of in (dtype, jnp.float32)
    )
    assert narrow.dtype == jnp.float32
    np.testing.assert_array_equal(narrow, wide)


@functools.cache
def neighbours(form, replaced):
    """Returns the norms of 200 pairs of neighbours, and how far weighted sums of them differ."""
    params, mask = registry.params(), jnp.ones(4, bool)
    keys = jax.random.split(jax.random.key(3), 200)

    def pair(key):
        here, there = (registry.examples(4, k) for k in jax.random.split(key))
        if not replaced:
            there, masks = here, (mask, mask.at[3].set(False))
        else:  # the last example becomes another, with a huge gradient
            there = jax.tree.map(lambda a, b: a.at[3].set(-30 * b[3]), here, there)
            masks = mask, mask
        return [
            form(registry.loss)(params, examples, mask=rows)
            for examples, rows in zip((here, there), masks, strict=True)
        ]

    def move(key, weights):
        here, there = map(lambda grads, w: grads.weighted_sum(w), pair(key), weights)
        moves = jax.tree.leaves(jax.tree.map(jnp.subtract, here, there))
        return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in moves))

    norms = jax.jit(lambda keys: jax.lax.map(lambda k: [g.squared_norms() for g in pair(k)], keys))
    moves = jax.jit(lambda weights: jax.lax.map(lambda one: move(*one), (keys, weights)))
    return norms(keys), moves


@forms
@clip_rules
@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_special", "replace_one"])
def test_law_7_neighbours_move_the_clipped_sum_by_at_most_the_sensitivity(form, rule, relation):
    clip = rule(1.0)
    norms, moves = neighbours(form, relation == "replace_one")
    weights = [jax.tree.broadcast(jax.vmap(clip.weights)(tree), tree) for tree in norms]
    worst = float(moves(weights).max())
    assert worst <= clip.sensitivity(relation) * (1 + 1e-5)
    assert worst > 0.6 * clip.sensitivity(relation)  # the bound is approached: the test has power


def test_law_8_two_fits_of_different_keys_share_no_noise_and_one_key_repeats_itself():
    plan = dpoptax.Plan(
        sampler=dpoptax.samplers.Poisson(50, 5), clip=1.0, noise_multiplier=1.0, num_steps=3,
        delta=1e-4,
    )  # fmt: skip

    def fit(seed):
        return dpoptax.training.fit(
            lambda params, x: jnp.sum(params * x),
            jnp.zeros(100),
            jnp.zeros((50, 100)),
            plan=plan,
            optimizer=optax.sgd(1.0),
            key=jax.random.key(seed),
            progress=False,
        ).params

    first, second, again = fit(0), fit(1), fit(0)
    np.testing.assert_array_equal(first, again)
    assert abs(np.corrcoef(first, second)[0, 1]) < 4.5 / math.sqrt(100)


@pytest.mark.slow
@pytest.mark.parametrize("root_of", [jax.random.key, dpoptax.random.insecure_key])
@samplers
def test_law_8_sampling_noise_and_model_keys_are_never_one_key(make, root_of):
    root, other = root_of(0), dpoptax.random.split_by_purpose(root_of(1))
    keys = dpoptax.random.split_by_purpose(root)
    assert str(jax.random.key_impl(keys.model_key)) == "threefry2x32"
    state = make(100, 10).init(keys.sampling_key)
    tx_state = dpoptax.privatize(1.0, 1.0, expected_batch_size=10, key=keys.noise_key).init(
        jnp.zeros(2)
    )
    roots = [root, *keys, *other, tx_state.key]
    derived = [
        *(jax.random.fold_in(state.key, step) for step in range(50)),
        *(jax.random.fold_in(tx_state.key, step) for step in range(50)),
        *(jax.random.fold_in(keys.model_key, step) for step in range(50)),
    ]
    data = [tuple(np.asarray(jax.random.key_data(key))) for key in itertools.chain(roots, derived)]
    assert len(set(data)) == len(data)


@pytest.mark.slow
def test_law_9_the_chunk_length_changes_no_number(monkeypatch):
    plan = dpoptax.Plan(
        sampler=dpoptax.samplers.Poisson(50, 5), clip=1.0, noise_multiplier=1.0, num_steps=20,
        delta=1e-4,
    )  # fmt: skip
    results = []
    for seconds in (0.0, 1e3):  # one step per dispatch, or a growing number
        monkeypatch.setattr(dpoptax.training._dispatch, "SECONDS_PER_DISPATCH", seconds)
        results.append(
            dpoptax.training.fit(
                lambda params, x: jnp.sum((params - x) ** 2),
                jnp.zeros(3),
                jnp.ones((50, 3)),
                plan=plan,
                optimizer=optax.sgd(0.1, momentum=0.9),
                key=jax.random.key(5),
                progress=False,
            )
        )
    np.testing.assert_allclose(results[0].params, results[1].params, rtol=1e-6)
    assert results[0].report() == results[1].report()


@pytest.mark.slow
@samplers
def test_law_10_the_accounted_event_is_that_of_the_sampler_and_the_noise_that_ran(make):
    sampler = make(50, 5)
    plan = dpoptax.Plan(sampler=sampler, clip=1.0, noise_multiplier=1.3, num_steps=7, delta=1e-4)
    assert plan.event(5) == sampler.event(1.3, 5, sampler.relation)
    result = dpoptax.training.fit(
        lambda params, x: jnp.sum(params * x),
        jnp.zeros(100),
        jnp.zeros((50, 100)),
        plan=plan,
        optimizer=optax.sgd(1.0),
        key=jax.random.key(0),
        progress=False,
    )
    assert result.num_steps == int(result.state.step) == int(result.state.sampler_state.step) == 7
    assert int(result.state.opt_state[0].step) == 7  # releases
    assert result.epsilon() == plan.epsilon(7)
    # With zero gradients and SGD at rate 1 the parameters are the sum of the noise that ran.
    spread = (
        float(jnp.std(result.params))
        * dpoptax.schedules.as_schedule(sampler.expected_batch_size).at(0)
        / math.sqrt(7)
    )
    assert abs(spread / 1.3 - 1) < 4.5 / math.sqrt(2 * 100)


def test_law_11_what_is_not_private_says_so():
    assert all(name.startswith("nonprivate_") for name in dpoptax.training.StepInfo._fields)
    for public in (
        dpoptax.training.StepInfo,
        dpoptax.PerExampleGrads,
        dpoptax.value_and_per_example_grads,
        dpoptax.samplers.Batch,
    ):
        assert "not private" in public.__doc__.lower()
