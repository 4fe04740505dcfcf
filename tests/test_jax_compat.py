"""What differs between JAX versions: reading and running jaxprs."""

import jax
import jax.numpy as jnp
import pytest

from dpoptax import _jax_compat


def with_own_derivative(function):
    wrapped = jax.custom_vjp(function)
    wrapped.defvjp(lambda x: (function(x), None), lambda _, g: (g,))
    return wrapped


WRAPPERS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": lambda f: lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, None, length=2)[0],
    "cond": lambda f: lambda x: jax.lax.cond(x[0] > 0, f, lambda x: x, x),
    "while": lambda f: lambda x: jax.lax.while_loop(lambda x: x[0] > 0, f, x),
    "custom_vjp": lambda f: with_own_derivative(f),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_primitive_is_found_however_deep_it_is(wrap):
    jaxpr = jax.make_jaxpr(jax.jit(wrap(jnp.sin)))(jnp.ones(2))
    assert _jax_compat.contains_primitive(jaxpr, jax.lax.sin_p)
    assert not _jax_compat.contains_primitive(jaxpr, jax.lax.cos_p)


def test_the_name_of_a_function_is_no_primitive():
    def conv_general_dilated(x):
        return x + 1

    jaxpr = jax.make_jaxpr(jax.jit(conv_general_dilated))(jnp.ones(2))
    assert not _jax_compat.contains_primitive(jaxpr, jax.lax.conv_general_dilated_p)


def test_a_jaxpr_runs_with_other_constants():
    constant = jnp.arange(3.0)
    jaxpr, constants = _jax_compat.split_constants(
        jax.make_jaxpr(lambda x: jnp.sum(constant * x))(jnp.ones(3))
    )
    assert len(_jax_compat.inputs_of(jaxpr)[0]) == 2
    (value,) = _jax_compat.run_jaxpr(jaxpr, constants, [jnp.ones(3)])
    (other,) = _jax_compat.run_jaxpr(jaxpr, [2 * constant], [jnp.ones(3)])
    assert (float(value), float(other)) == (3.0, 6.0)


def test_the_inputs_of_a_scan_are_counted():
    def function(w, c, xs):
        return jax.lax.scan(lambda c, x: (jnp.sin(c @ w) + x, c), c, xs)

    jaxpr = jax.make_jaxpr(function)(jnp.ones((2, 2)), jnp.ones(2), jnp.ones((3, 2)))
    (eqn,) = (eqn for eqn in jaxpr.eqns if eqn.primitive is jax.lax.scan_p)
    assert _jax_compat.scan_counts(eqn) == (1, 1)
