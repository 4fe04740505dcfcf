"""The table of linear primitives: each entry against JAX's own derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpoptax
from dpoptax.per_example._loss_trace import trace_loss
from dpoptax.per_example._primitives import linear_primitive, may_spread_nan
from dpoptax.per_example._tracing.concatenated import cut

RNG = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def convolve(w, x):
    return jax.lax.conv_general_dilated(x[None], w, (1,), "SAME")


# Primitive, position of the parameter: an equation, the parameter, the other operand, and how many
# terms one entry of the gradient adds up.
USES = {
    "dot_general 0": (lambda w, x: w @ x, draw(4, 3), draw(3, 5), 5),
    "dot_general 1": (lambda w, x: x @ w, draw(3, 4), draw(5, 3), 5),
    "dot_general, batched": (
        lambda w, x: jnp.einsum("bti,bij->btj", x, w), draw(2, 3, 4), draw(2, 5, 3), 5,
    ),
    "conv_general_dilated 1": (convolve, draw(2, 3, 2), draw(3, 7), 7),
    "gather 0": (lambda w, x: w[x], draw(6, 2), jnp.array([1, 1, 5]), 3),
    "add 0": (lambda w, x: w + x, draw(4), draw(4), 1),
    "add 1": (lambda w, x: x + w, draw(1, 4), draw(3, 4), 3),
    "mul 0": (lambda w, x: w * x, draw(3, 1), draw(3, 4), 4),
    "mul 1": (lambda w, x: x * w, draw(1, 4), draw(3, 4), 3),
    "ragged_dot_general 1": (
        lambda w, x: jax.lax.ragged_dot(x, w, jnp.array([2, 3])), draw(2, 3, 4), draw(5, 3), 5,
    ),
}  # fmt: skip


def sites_of(function, w, x):
    trace, _, _ = trace_loss(lambda w, x: jnp.sum(jnp.tanh(function(w, x))), w, (x,))
    return trace.program.found.sites


@pytest.mark.parametrize("name", USES)
def test_a_use_is_found_and_its_gradient_follows_from_the_saved_operands(name):
    function, w, x, num_terms = USES[name]
    (site,) = (site.equation for site in sites_of(function, w, x))
    linear = linear_primitive(site.primitive)
    assert site.primitive.name == name.split()[0].strip(",")
    assert site.position in linear.positions
    saved = [x] if site.operands else []
    operands = [
        spec.shape
        for i, spec in enumerate(site.operands)
        if i not in linear.index_operands or site.primitive is jax.lax.gather_p
    ]
    assert operands == [
        operand.shape if site.primitive is not jax.lax.gather_p else (*operand.shape, 1)
        for operand in (
            saved if site.primitive is not jax.lax.conv_general_dilated_p else [x[None]]
        )
    ]
    assert linear.num_terms(site) == num_terms
    assert linear.multiplications(site) > 0
    assert not site.output_window


@pytest.mark.parametrize(
    "name", ["dot_general 0", "dot_general 1", "dot_general, batched", "add 1"]
)
def test_the_windows_of_a_part_give_the_part_of_the_gradient(name):
    """A window of the parameter needs its windows of the operand and of the cotangent only."""
    function, w, x, _ = USES[name]
    cotangent = jax.eval_shape(function, w, x)
    cotangent = draw(*cotangent.shape)
    whole = jax.vjp(lambda w: function(w, x), w)[1](cotangent)[0]
    eqn = next(
        eqn
        for eqn in jax.make_jaxpr(function)(w, x).eqns
        if linear_primitive(eqn.primitive) is not None
    )
    (site,) = sites_of(function, w, x)
    linear = linear_primitive(site.primitive)
    # The second half of the last axis of the parameter.
    half = w.shape[-1] // 2
    window = (*((0, size) for size in w.shape[:-1]), (half, w.shape[-1] - half))
    operand_windows, output_window = linear.windows(eqn, site.position, window)
    operands = [cut(x, part) for part in operand_windows] or [0.0]
    _, pull = jax.vjp(lambda part: function(part, *operands), cut(w, window))
    if linear.primitive is jax.lax.add_p:
        _, pull = jax.vjp(
            lambda part: jnp.broadcast_to(part, cut(x, output_window).shape), cut(w, window)
        )
    (part,) = pull(cut(cotangent, output_window))
    np.testing.assert_allclose(part, cut(whole, window), rtol=1e-5)


def test_only_convolutions_spread_nan():
    def equations(name):
        function, w, x, _ = USES[name]
        return jax.make_jaxpr(function)(w, x).eqns

    spreading = {name for name in USES if may_spread_nan(equations(name))}
    assert spreading == {"conv_general_dilated 1"}


def test_a_primitive_outside_the_table_falls_back_to_plain_differentiation():
    assert linear_primitive(jax.lax.div_p) is None
    (row,) = dpoptax.explain(lambda w, x: jnp.sum(w / x), jnp.ones(3), jnp.ones((2, 3)))
    assert (row.form, row.rule) == ("stacked", "used by div")
