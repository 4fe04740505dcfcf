"""A linear use that computes squared norms, or its part of the sum, during the backward pass.

The equation gets two more inputs, which it does not read: zeros for the norm of each example, and
zeros for the gradient of the parameter. It gets one more output: a zero for each example.

    output, zero = equation(operands, parameter, norm_zeros, sum_zeros)

The backward pass receives the cotangent of `output`, which is g, and the cotangent of `zero`, which
is the weight of the example. It returns the squared norms of the gradients x_i' g_i as the
cotangent of `norm_zeros`, and `sum_i weight_i x_i' g_i` as the cotangent of `sum_zeros`. So inputs
and cotangents of a layer are needed only while that layer is differentiated, scans and checkpoints
keep doing their work, and the cotangents g are the same in both backward passes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dpoptax.per_example._norm_rules import Factors, NormRule, choose_rule, sum_weighted
from dpoptax.per_example._primitives import run_equation
from dpoptax.per_example._tracing.interpreter import LinearUse
from dpoptax.per_example._tracing.site import EqnPath, Site
from dpoptax.per_example._tracing.taps import Saved, Taps
from dpoptax.per_example._tracing.visitors import TapRunner


class SiteZeros(NamedTuple):
    """The zeros that a streamed site receives.

    Attributes:
        norm: one number per example.
        total: shape of the parameter, float32 or wider.
    """

    norm: Array
    total: Array


def zeros_key(site: Site) -> EqnPath:
    """Returns the key of a site's zeros among the taps; no equation has a negative number."""
    return (*site.path, -1)


def is_streamable(sites: Sequence[Site], spec: jax.ShapeDtypeStruct) -> bool:
    """Whether each number of the leaf is used by one run of one equation.

    Then the squared norms of the runs add up to that of the leaf. A weight that is used twice, or
    shared by the steps of a scan, needs the factors of all its uses together. Under `vmap` a `cond`
    may give its parameters a batch axis, so its sites are left out.
    """
    (site, *others) = sites
    return (
        not others
        and not site.in_cond
        and all(scan.sliced for scan in site.scans)
        and site.output_window is None
        and site.preserves_norms(spec)
    )


def rule_of_one_run(site: Site) -> NormRule:
    """Returns the norm rule of one run of a site, as if the slice that it uses were the leaf."""
    alone = dataclasses.replace(site.equation, scans=(), steps=())
    return choose_rule([alone], site.parameter)


class StreamRunner(TapRunner):
    """Saves the operands of some sites, and runs the others as streamed sites."""

    def __init__(
        self,
        kept: tuple[Site, ...],
        streamed: dict[EqnPath, tuple[Site, NormRule]],
        fallback_reasons: dict[int, str],
    ) -> None:
        super().__init__(kept, fallback_reasons)
        self._streamed = streamed

    def run_linear_use(
        self, uses: Sequence[LinearUse], values: Sequence[Any], taps: Taps
    ) -> tuple[list[Any], Saved]:
        """Runs the equation; saves the zeros whose cotangents are the weights."""
        use = uses[0]
        if use.path not in self._streamed:
            return super().run_linear_use(uses, values, taps)
        site, rule = self._streamed[use.path]
        output, zero = _run_streamed(use, rule, values, taps[zeros_key(site)])
        return [output], {use.path: (zero,)}


def _run_streamed(
    use: LinearUse, rule: NormRule, values: Sequence[Any], zeros: SiteZeros
) -> tuple[Array, Array]:
    """Runs an equation of one example as a streamed site."""
    parameter = values[use.position]
    others = [value for i, value in enumerate(values) if i != use.position]
    specs = [jax.ShapeDtypeStruct(jnp.shape(value), jnp.result_type(value)) for value in others]

    def run(others: list[Any], parameter: Array) -> Array:
        def one(others: list[Any]) -> Array:
            inputs = [*others[: use.position], parameter, *others[use.position :]]
            return run_equation(use.eqn, inputs)[0]

        return jax.vmap(one)(others)

    @jax.custom_vjp
    def of_batch(others: list[Any], parameter: Array, zeros: SiteZeros) -> tuple[Array, Array]:
        return run(others, parameter), jnp.zeros_like(zeros.norm)

    def forward(others: list[Any], parameter: Array, zeros: SiteZeros) -> Any:
        inputs = [*others[: use.position], parameter, *others[use.position :]]
        saved = tuple(inputs[i] for i in use.linear.saved_operands[use.position])
        numbers = [None if _is_float(value) else value for value in others]
        return of_batch(others, parameter, zeros), (saved, parameter, numbers)

    def backward(residuals: Any, cotangents: Any) -> Any:
        (saved, parameter, numbers), (cotangent, weights) = residuals, cotangents
        factors = rule.prepare([Factors(saved, cotangent)])
        norms = rule.squared_norms(factors)
        total = sum_weighted(rule, factors, weights, weights != 0)
        return (
            _pull_operands(run, specs, numbers, parameter, cotangent),
            None,
            SiteZeros(norms, total),
        )

    of_batch.defvjp(forward, backward)

    # The rules need the whole batch at once: to sum over it, and to split it into chunks. So the
    # function of one example has its own rule for `vmap`.
    @jax.custom_batching.custom_vmap
    def of_example(others: list[Any], parameter: Array, zeros: SiteZeros) -> tuple[Array, Array]:
        rows = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], others)
        output, zero = of_batch(rows, parameter, SiteZeros(zeros.norm[None], zeros.total))
        return output[0], zero[0]

    @of_example.def_vmap
    def _(axis_size: int, in_batched: Any, others: Any, parameter: Any, zeros: Any) -> Any:
        def rows(leaf: Array, batched: bool) -> Array:
            return leaf if batched else jnp.broadcast_to(leaf, (axis_size, *jnp.shape(leaf)))

        others_batched, parameter_batched, zeros_batched = in_batched
        assert not parameter_batched, "a parameter has no batch axis"
        norm = rows(zeros.norm, zeros_batched.norm)
        outputs = of_batch(
            jax.tree.map(rows, others, others_batched), parameter, SiteZeros(norm, zeros.total)
        )
        return outputs, (True, True)

    return of_example(others, parameter, zeros)


def _is_float(value: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(value), jnp.floating)


def _pull_operands(
    run: Callable[..., Array],
    specs: list[Any],
    numbers: list[Any],
    parameter: Array,
    cotangent: Array,
) -> list[Any]:
    """Returns the cotangents of the other operands of an equation; None for whole numbers."""
    # The equation is linear in each float, so the cotangents do not depend on its value. They do
    # depend on whole numbers, such as sizes of groups.
    batch = cotangent.shape[0]
    constants = [
        jnp.zeros((batch, *spec.shape), spec.dtype) if number is None else number
        for spec, number in zip(specs, numbers, strict=True)
    ]
    floats = [i for i, number in enumerate(numbers) if number is None]
    if not floats:
        return [None] * len(specs)

    def of_floats(values: list[Array]) -> Array:
        places = dict(zip(floats, values, strict=True))
        return run([places.get(i, value) for i, value in enumerate(constants)], parameter)

    _, pull = jax.vjp(of_floats, [constants[i] for i in floats])
    found = dict(zip(floats, pull(cotangent)[0], strict=True))
    return [found.get(i) for i in range(len(specs))]
