"""The laws of clip rules with state, over every such rule, gradient form and mechanism.

Each law holds for both sums that a step releases: that of the gradients, and that of the votes. A
step is compiled once for each rule and form, and the laws call it with other batches and bounds.
"""

import functools
import math

import attrs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import registry

import dpoptax
from dpoptax.clipping import StatefulClipRule
from dpoptax.clipping._count_noise import split_noise
from dpoptax.per_example._counted import CountedGrads, vote_counter
from dpoptax.per_example._stacked import StackedGrads

forms = pytest.mark.parametrize(
    "form",
    [
        pytest.param(name, marks=() if name == "microbatched" else pytest.mark.slow)
        for name in registry.FORMS
    ],
)
rules = pytest.mark.parametrize("rule", registry.CLIP_RULES_WITH_STATE)
PARAMS, EXAMPLES = registry.params(), registry.examples(8)
EVERYBODY, NOBODY = jnp.ones(8, bool), jnp.zeros(8, bool)
# The public divisor, other than the realised size of any batch below.
SIZE = 32.0


def with_bound(state, rule, bound):
    """The state of a run that has reached this bound."""
    return state._replace(clip_state=registry.CLIP_RULES_WITH_STATE[rule](bound).init())


@functools.cache
def compiled(rule, form, noise_multiplier):
    """Returns the compiled first step: from a batch and a bound to the release and the state."""
    tx = dpoptax.privatize(
        registry.CLIP_RULES_WITH_STATE[rule](1.0), noise_multiplier, expected_batch_size=SIZE,
        key=jax.random.key(0),
    )  # fmt: skip
    grads_fn, start = registry.FORMS[form](registry.loss), tx.init(PARAMS)

    @jax.jit
    def step(state, examples, mask):
        updates, state = tx.update(grads_fn(PARAMS, examples, mask=mask), state, PARAMS)
        return updates, state.clip_state

    def first(examples=EXAMPLES, mask=EVERYBODY, bound=1.0):
        return step(with_bound(start, rule, bound), examples, mask)

    return first


def assert_equal(tree, other):
    for leaf, expected in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(leaf, expected)


def assert_close(tree, other):
    assert registry.distance(tree, other) <= 1e-5 * registry.global_norm(other)


def gradients_and_norms():
    """The gradient and the norm of each example, by a plain loop."""
    grad = jax.jit(jax.grad(registry.loss))
    found = [grad(PARAMS, jax.tree.map(lambda leaf, i=i: leaf[i], EXAMPLES)) for i in range(8)]
    return found, [registry.global_norm(gradient) for gradient in found]


@forms
@rules
def test_laws_1_and_2_without_noise_a_step_releases_the_clipped_sum_of_a_plain_loop(form, rule):
    gradients, norms = gradients_and_norms()
    step = compiled(rule, form, 0.0)
    states = []
    # The last bound clips nothing, so the release is the mean gradient.
    for bound in (float(np.mean(sorted(norms)[3:5])), 1e6):
        scales = [min(1.0, bound / norm) / SIZE for norm in norms]
        expected = jax.tree.map(
            lambda *leaves, scales=scales: sum(map(np.multiply, scales, leaves)), *gradients
        )
        updates, state = step(bound=bound)
        assert_close(updates, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), expected))
        states.append(math.log(state.l2_clip / bound))
    # Half of the examples are below the first bound, and all are below the last one.
    assert states[0] == pytest.approx(0.0, abs=1e-6)
    assert states[1] == pytest.approx(-0.2 * 4 / SIZE, abs=1e-6)


@forms
@rules
def test_law_3_order_and_padding_change_no_state(form, rule):
    step, (x, y) = compiled(rule, form, 1.0), EXAMPLES
    rows = jnp.array([True, False, True, True, False, True, True, True])
    order = jnp.array([7, 6, 2, 3, 4, 5, 1, 0])
    expected, state = step(mask=rows)
    for filler in (0.0, math.inf, math.nan):
        filled = [jnp.where(rows[:, None], leaf, filler) for leaf in (x, y)]
        updates, same = step(tuple(filled), rows)
        assert_close(updates, expected)
        assert_equal(same, state)
    for other in registry.FORMS:
        if other in (form, "factored"):
            reordered = jax.tree.map(lambda leaf: leaf[order], EXAMPLES)
            updates, same = compiled(rule, other, 1.0)(reordered, rows[order])
            assert_close(updates, expected)
            assert_equal(same, state)


@forms
@rules
def test_law_4_an_example_with_a_non_finite_gradient_adds_nothing_to_either_sum(form, rule):
    step, (x, y) = compiled(rule, form, 1.0), EXAMPLES
    expected, state = step(mask=jnp.arange(8) != 2)
    for poison in (math.inf, math.nan, 3e38):
        updates, same = step((x.at[2].set(poison), y.at[2].set(poison)))
        assert_close(updates, expected)
        assert_equal(same, state)


@forms
@rules
def test_laws_5_and_6_an_empty_batch_releases_the_noise_that_is_added_to_every_sum(form, rule):
    noise, silent = compiled(rule, form, 1.0)(mask=NOBODY)
    assert all(np.all(leaf != 0) for leaf in jax.tree.leaves(noise))
    assert np.isfinite(silent.l2_clip)
    for real in (1, 5, 8):  # the realised batch size divides nothing and scales no noise
        exact, counted = compiled(rule, form, 0.0)(mask=jnp.arange(8) < real)
        updates, state = compiled(rule, form, 1.0)(mask=jnp.arange(8) < real)
        assert_close(updates, jax.tree.map(jnp.add, exact, noise))
        # Each example has one vote, and all logarithms move by the same noise.
        moved = math.log(state.l2_clip / silent.l2_clip)
        assert moved == pytest.approx(math.log(counted.l2_clip), abs=1e-6)
        assert abs(moved) <= 0.2 * real / (2 * SIZE) + 1e-6


@pytest.mark.parametrize(
    "mechanism",
    [
        pytest.param(name, marks=pytest.mark.slow if "four" in name else ())
        for name in registry.MECHANISMS
    ],
)
@pytest.mark.parametrize("count_noise", [pytest.param(None, marks=pytest.mark.slow), 0.55])
@rules
def test_law_7_neighbours_move_both_releases_together_by_at_most_the_sensitivity(
    mechanism, rule, count_noise
):
    """In standard deviations of their noise. One key draws one noise, which the difference lacks.

    Batches are adversarial: norms at the bound, far from it, zero and not finite; and the example
    that differs is opposite to the one that it replaces.
    """
    size, noise, count = 3, 1.0, 400
    rule = attrs.evolve(registry.CLIP_RULES_WITH_STATE[rule](2.0), count_noise=count_noise)
    tx = dpoptax.privatize(
        rule, noise, expected_batch_size=1.0, key=jax.random.key(0),
        mechanism=registry.MECHANISMS[mechanism](),
    )  # fmt: skip
    params = jnp.zeros(size)
    split = split_noise(noise, rule.count_noise)

    @jax.jit
    def releases(state, gradients, mask):
        def one(gradients, mask):
            release, after = tx.update(StackedGrads(gradients, mask), state, params)
            votes = jnp.log(after.clip_state.l2_clip / 2.0) / -0.2 * 2
            return jnp.append(release / 2.0 / split.gradients, votes / split.votes)

        return jax.vmap(one)(gradients, mask)

    draw = np.random.default_rng(3)
    norms = np.array([0.0, 1e-3, 1.0, 1.999, 2.0, 2.001, 7.0, 1e6, math.inf, math.nan])
    rows = draw.normal(size=(count, 4, size))
    rows /= np.linalg.norm(rows, axis=2, keepdims=True)
    here = rows * draw.choice(norms, size=(count, 4, 1))
    other = here.copy()
    other[:, 3] = -rows[:, 3] * draw.choice(norms, size=(count, 1))
    everybody, removed = np.ones((count, 4), bool), np.ones((count, 4), bool)
    removed[:, 3] = False
    state = tx.init(params)
    first = np.asarray(releases(state, jnp.asarray(here, jnp.float32), everybody))
    # Removing an example, or replacing it by an empty one, leaves a row without an example.
    for changed, mask, most in ((here, removed, 1.0), (other, everybody, 2.0)):
        second = np.asarray(releases(state, jnp.asarray(changed, jnp.float32), mask))
        worst = np.linalg.norm(first - second, axis=1).max()
        assert worst <= most / noise * (1 + 1e-4)
        # The bound is approached. Neither sum alone would reach it.
        assert worst > 0.99 * most / noise
        if count_noise is not None:
            for part in (first - second)[:, :size], (first - second)[:, size:]:
                assert np.linalg.norm(part, axis=1).max() < 0.95 * most / noise


@rules
def test_law_8_neither_noise_repeats_across_steps_and_keys(rule):
    params, zeros, found, counts = jnp.zeros(500), jnp.zeros((1, 500)), [], []
    rule = registry.CLIP_RULES_WITH_STATE[rule](1.0)
    txs = [
        dpoptax.privatize(rule, 1.0, expected_batch_size=1.0, key=jax.random.key(seed))
        for seed in (0, 1)
    ]
    update = jax.jit(txs[0].update)  # the key is that of the state
    for tx in txs:
        state = tx.init(params)
        for _ in range(4):
            before = state.clip_state.l2_clip
            noise, state = update(zeros, state, params)
            found.append(np.asarray(noise) / float(before))
            counts.append(math.log(state.clip_state.l2_clip / before))
    correlations = np.corrcoef(found)[np.triu_indices(8, 1)]
    assert np.abs(correlations).max() < 5.5 / math.sqrt(500)
    assert min(np.diff(sorted(counts))) > 1e-4


def test_a_rule_of_the_users_own_cannot_vote_for_more_than_one():
    """Its votes are limited, and padding and gradients that are not finite have none."""

    class Greedy(dpoptax.clipping.QuantileClip):
        def votes(self, squared_norms, state):
            return jnp.full_like(squared_norms["w"], 1e9)

    rule = Greedy(1.0)
    assert isinstance(rule, StatefulClipRule)
    grads = StackedGrads(
        {"w": jnp.array([[1.0], [5.0], [jnp.nan], [2.0]])}, jnp.array([True, True, True, False])
    )
    counter = vote_counter(lambda squared_norms: rule.votes(squared_norms, rule.init()))
    assert int(CountedGrads(grads, counter).count()) == 2
