"""Microbatches: which rows they take, and that losses come from the pass that sums gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpoptax
from dpoptax import _jax_compat
from dpoptax.per_example._api import deferred_values_and_grads
from dpoptax.per_example._parts import Parts

BATCH = 12
RULE = dpoptax.clipping.FlatClip(0.5)
PARAMS = {
    "layers": 0.4 * jax.random.normal(jax.random.key(0), (2, 6, 6)),
    "out": jax.random.normal(jax.random.key(1), (6,)),
}
# Padding anywhere, also in the middle of a microbatch, and NaN in it.
MASK = jnp.array([1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 0], bool)
EXAMPLES = jnp.where(MASK[:, None], jax.random.normal(jax.random.key(2), (BATCH, 6)), jnp.nan)


def loss_with_metrics(params, x):
    hidden, sizes = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), jnp.sum(x**2)), x, params["layers"])
    logit = hidden @ params["out"]
    return logit**2, {"hit": logit > 0, "sizes": sizes, "out": params["out"]}


def assert_close(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected
    )


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (Parts(size=4, lanes=1), [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),
        # Two rows of each half of the batch. The halves are on two devices.
        (Parts(size=4, lanes=2), [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]),
        # Copies of the last row of a lane fill its last part.
        (Parts(size=5, lanes=1), [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 11, 11, 11]]),
        (Parts(size=8, lanes=2), [[0, 1, 2, 3, 6, 7, 8, 9], [4, 5, 5, 5, 10, 11, 11, 11]]),
    ],
)
def test_a_part_takes_equally_many_rows_of_every_lane(parts, expected):
    cut, mask = parts.cut(jnp.arange(BATCH)), parts.is_real(MASK)
    numbers = range(cut.shape[1])
    rows = np.array([parts.part(cut, number) for number in numbers])
    real = np.array([parts.part(mask, number) for number in numbers])
    assert rows.tolist() == expected
    # Each row that counts is in one part, once.
    assert sorted(rows[real]) == np.flatnonzero(MASK).tolist()
    assert parts.join(jnp.array(rows), BATCH).tolist() == list(range(BATCH))


@pytest.mark.parametrize(
    "form",
    [pytest.param(form, marks=pytest.mark.slow) for form in ("stacked", "recomputed")]
    + ["factored"],
)
def test_lanes_and_padding_anywhere_change_no_number(form):
    def readings(**options):
        both = deferred_values_and_grads(loss_with_metrics, has_aux=True, **options)
        values, grads = both(PARAMS, EXAMPLES, mask=MASK)
        total = grads.clip_and_sum(RULE.weights)
        return values(), total, grads.squared_norms()

    @jax.jit
    def run():
        # Microbatches of nine rows of four, so that copies fill the second one.
        parts = readings(form=form, microbatch_size=9, shards=3)
        return parts, readings(form="stacked")

    parts, whole = run()
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(whole))
    assert float(whole[0][0].max()) > 0
    assert_close(parts, whole)


def count(jaxpr, name):
    return sum(eqn.primitive.name == name for eqn in _jax_compat.equations(jaxpr))


def test_losses_and_norms_of_microbatches_take_no_pass_of_their_own():
    def passes(both, *, diagnostics=False):
        def run(examples):
            values, grads = both(PARAMS, examples, mask=MASK)
            total = grads.clip_and_sum(RULE.weights)
            return total, values(), grads.squared_norms() if diagnostics else None

        jaxpr = jax.make_jaxpr(run)(EXAMPLES).jaxpr
        return sum(eqn.primitive.name == "scan" for eqn in jaxpr.eqns)

    options = {"has_aux": True, "microbatch_size": 4}
    deferred = deferred_values_and_grads(loss_with_metrics, **options)
    assert passes(deferred) == passes(deferred, diagnostics=True) == 1
    # Losses that are returned before the gradients are clipped need a pass.
    at_once = dpoptax.value_and_per_example_grads(loss_with_metrics, **options)
    assert passes(lambda *args, **masks: as_function(*at_once(*args, **masks))) == 2


def as_function(values, grads):
    return (lambda: values), grads


@pytest.mark.parametrize("form", ["factored", "recomputed", "stacked"])
def test_metrics_take_no_forward_pass_of_their_own(form):
    def layers_run(loss_fn, *, has_aux):
        both = dpoptax.value_and_per_example_grads(loss_fn, form=form, has_aux=has_aux)
        return count(jax.make_jaxpr(both)(PARAMS, EXAMPLES), "tanh")

    plain = layers_run(lambda *args: loss_with_metrics(*args)[0], has_aux=False)
    assert layers_run(loss_with_metrics, has_aux=True) == plain > 0


def test_what_a_pass_found_is_not_used_in_another_trace():
    """A gradient that a compiled function closes over remembers nothing from inside of it."""
    both = deferred_values_and_grads(lambda w, x: jnp.vdot(w, x), microbatch_size=4)
    values, grads = both(PARAMS["out"], EXAMPLES, mask=MASK)
    jax.make_jaxpr(lambda: (grads.clip_and_sum(RULE.weights), values()))()
    np.testing.assert_allclose(values()[MASK], EXAMPLES[MASK] @ PARAMS["out"], rtol=1e-5)
