"""Convolutions are computed in the one layout that is fast inside loops, and are the same."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpoptax
from dpoptax.per_example._devices import DEVICES
from dpoptax.per_example._primitives import fast_convolution
from dpoptax.per_example._primitives.convolution import CONVOLUTION
from dpoptax.per_example._primitives.fast_convolution import convolve, has_slow_convolutions

# Shapes of (images, kernel), with examples, channels and features of 4, 6 and 8 where they fit.
KINDS = {
    "channels last": ((4, 9, 7, 6), (3, 2, 6, 8), "NHWC,HWIO,NHWC", {}),
    "channels first": ((4, 6, 9, 7), (8, 6, 3, 2), "NCHW,OIHW,NCHW", {}),
    "mixed": ((9, 4, 6, 7), (6, 3, 8, 2), "HNCW,IHOW,CHWN", {}),
    "strides and padding": (
        *((4, 9, 7, 6), (3, 2, 6, 8), "NHWC,HWIO,NHWC"),
        {"window_strides": (2, 3), "padding": ((1, 2), (0, 3))},
    ),
    "negative padding": (
        *((4, 9, 7, 6), (3, 2, 6, 8), "NHWC,HWIO,NCHW"),
        {"padding": ((-1, 2), (1, -2))},
    ),
    "dilations": (
        *((4, 9, 7, 6), (3, 2, 6, 8), "NHWC,HWIO,NHWC"),
        {"lhs_dilation": (2, 1), "rhs_dilation": (1, 3)},
    ),
    "groups of features": (
        *((4, 6, 9, 7), (9, 2, 3, 2), "NCHW,OIHW,NHWC"),
        {"feature_group_count": 3},
    ),
    "depthwise": ((4, 9, 7, 6), (3, 2, 1, 12), "NHWC,HWIO,NHWC", {"feature_group_count": 6}),
    "groups of examples": ((4, 9, 7, 6), (3, 2, 6, 8), "NHWC,HWIO,NHWC", {"batch_group_count": 2}),
    "one axis": ((4, 9, 6), (3, 6, 8), "NHC,HIO,NHC", {}),
    "three axes": ((4, 6, 5, 4, 3), (8, 6, 2, 3, 2), "NCDHW,OIDHW,NDHWC", {}),
    "no axis": ((4, 6), (8, 6), "NC,OI,CN", {}),
}


@functools.cache
def case(name):
    """An equation's parameters, and whole numbers to convolve: their sums are exact."""
    images, kernel, layout, options = KINDS[name]
    rank = len(images) - 2
    options = {"window_strides": (1,) * rank, "padding": ((1, 1),) * rank} | options

    def run(lhs, rhs):
        return jax.lax.conv_general_dilated(
            lhs, rhs, dimension_numbers=tuple(layout.split(",")), **options
        )

    rng = np.random.default_rng(0)
    values = [jnp.asarray(rng.integers(-3, 4, shape), jnp.float32) for shape in (images, kernel)]
    (eqn,) = jax.make_jaxpr(run)(*values).jaxpr.eqns
    return run, eqn.params, values


@pytest.mark.parametrize("name", KINDS)
def test_outputs_and_derivatives_are_those_of_jax(name):
    run, params, values = case(name)
    expected, pull = jax.vjp(run, *values)
    found, fast_pull = jax.vjp(functools.partial(convolve, params), *values)
    np.testing.assert_array_equal(found, expected)
    cotangent = jnp.asarray(np.random.default_rng(1).integers(-3, 4, expected.shape), jnp.float32)
    for one, other in zip(fast_pull(cotangent), pull(cotangent), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", KINDS)
def test_all_of_them_have_the_layout_that_is_fast(name):
    run, params, values = case(name)

    def derivatives(run, *values):
        output, pull = jax.vjp(run, *values)
        return output, pull(output)

    fast = jax.make_jaxpr(functools.partial(derivatives, functools.partial(convolve, params)))
    assert not has_slow_convolutions(fast(*values))
    # The test has power: those of JAX have other layouts.
    assert has_slow_convolutions(jax.make_jaxpr(functools.partial(derivatives, run))(*values))


@pytest.mark.parametrize("name", ["channels last", "channels first", "depthwise"])
def test_examples_alone_are_those_of_the_batch(name):
    """Under `vmap`, also of both operands: a kernel per example."""
    run, params, (images, kernel) = case(name)
    many = jnp.stack([images, images[::-1], images + 1])
    kernels = jnp.stack([kernel, kernel + 1, -kernel])

    def gradients(run):
        loss = lambda *pair: jnp.sum(run(*pair) ** 2)  # noqa: E731
        return (
            jax.vmap(jax.grad(loss), (0, None))(many, kernel),
            jax.vmap(jax.grad(loss, argnums=1), (0, None))(many, kernel),
            jax.vmap(jax.grad(loss, argnums=(0, 1)))(many, kernels),
        )

    found, expected = gradients(functools.partial(convolve, params)), gradients(run)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_operands_that_no_derivative_needs_are_not_kept():
    """A scan over frozen kernels would stack the images of all turns."""
    _, params, (images, kernel) = case("channels last")

    def residuals(argnum):
        function = lambda operand: convolve(  # noqa: E731
            params, *(images, operand) if argnum else (operand, kernel)
        )
        _, pull = jax.vjp(function, (images, kernel)[argnum])
        return {leaf.shape for leaf in jax.tree.leaves(pull) if hasattr(leaf, "shape")}

    assert images.shape not in residuals(0)
    assert kernel.shape not in residuals(1)


def test_other_devices_run_the_equation_as_it_is(monkeypatch):
    _, params, values = case("channels first")
    tpu = next(device for device in DEVICES if not device.is_cpu)
    monkeypatch.setattr(fast_convolution, "current_device", lambda: tpu)
    found = jax.make_jaxpr(functools.partial(convolve, params))(*values)
    assert [eqn.primitive.name for eqn in found.jaxpr.eqns] == ["conv_general_dilated"]
    assert found.jaxpr.eqns[0].params == params


NETWORKS = {
    "a kernel": lambda params, x: jnp.sum(_layer(params["k"], x) ** 2),
    "a shared kernel": lambda params, x: jnp.sum(_layer(params["k"], _layer(params["k"], x)) ** 2),
    # A kernel that is multiplied by itself has no norm rule.
    "a materialized kernel": lambda params, x: jnp.sum(_layer(params["k"] ** 2, _layer(1.0, x))),
}


def _layer(kernel, image):
    kernel = jnp.broadcast_to(kernel, (2, 2, 3, 3))
    return jnp.tanh(jax.lax.conv(image, kernel, (1, 1), "SAME"))


@pytest.mark.parametrize("form", ["factored", "recomputed", "stacked"])
@pytest.mark.parametrize("name", NETWORKS)
def test_no_form_has_slow_convolutions(form, name):
    params, images = {"k": jnp.ones((2, 2, 3, 3))}, jnp.ones((5, 1, 2, 8, 8))
    rule = dpoptax.clipping.FlatClip(1.0)

    def clipped(params, images):
        grads = dpoptax.per_example_grads(NETWORKS[name], form=form)(params, images)
        return grads.clip_and_sum(rule.weights)

    assert not has_slow_convolutions(jax.make_jaxpr(clipped)(params, images))
    plain = jax.vmap(jax.grad(NETWORKS[name]), (None, 0))
    assert has_slow_convolutions(jax.make_jaxpr(plain)(params, images))


def test_clipped_sums_can_be_differentiated_in_both_modes():
    params = {"k": jnp.linspace(-1.0, 1.0, 36).reshape(2, 2, 3, 3)}
    images = jax.random.normal(jax.random.key(0), (3, 1, 2, 4, 4))
    weights = jnp.array([1.0, 0.5, 0.25])

    def summed(params):
        return dpoptax.per_example_grads(NETWORKS["a kernel"])(params, images).weighted_sum(weights)

    def expected(params):
        stacked = jax.vmap(jax.grad(NETWORKS["a kernel"]), (None, 0))(params, images)
        return jax.tree.map(lambda leaf: jnp.tensordot(weights, leaf, 1), stacked)

    for derivative in (jax.jacfwd, jax.jacrev):
        found, other = derivative(summed)(params)["k"]["k"], derivative(expected)(params)["k"]["k"]
        np.testing.assert_allclose(found, other, rtol=1e-4, atol=1e-4)


def test_a_tangent_of_zero_stays_one():
    _, params, (images, kernel) = case("channels last")

    def tangent_of(images, kernel):
        return jax.jvp(
            lambda images, kernel: convolve(params, jax.lax.stop_gradient(images), kernel),
            *((images, kernel), (images, jnp.zeros_like(kernel))),
        )[1]

    assert not float(jnp.abs(tangent_of(images, kernel)).max())


@pytest.mark.untyped  # a part of a site suffices
def test_gradients_of_narrow_convolutions_are_computed_in_float32():
    def run(images, kernel):
        return jax.lax.conv_general_dilated(
            images, kernel, (1, 1), "SAME", preferred_element_type=jnp.bfloat16,
            precision=jax.lax.Precision.DEFAULT,
        )  # fmt: skip

    images = jax.random.normal(jax.random.key(0), (2, 3, 5, 5))
    kernel = jax.random.normal(jax.random.key(1), (4, 3, 3, 3))
    narrow = (images.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    (eqn,) = jax.make_jaxpr(run)(*narrow).jaxpr.eqns
    found = CONVOLUTION.bind_float32(types.SimpleNamespace(params=eqn.params), kernel, (images,))
    assert found.dtype == jnp.float32
    expected = jax.lax.conv(images, kernel, (1, 1), "SAME", precision="highest")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
