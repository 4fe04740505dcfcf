"""A linear use that computes squared norms, or its part of the sum, during the backward pass.

The equation gets two more inputs, which it does not read: zeros for the norm of each example, and
zeros for the gradient of the parameter. It gets one more output: zeros for each example.

    output, zeros = equation(operands, parameter, norm_zeros, sum_zeros)

The backward pass receives the cotangent of `output`, which is g, and the cotangent of `zeros`, the
message, which holds the weight of the example. It returns the squared norms of the gradients
x_i' g_i as the cotangent of `norm_zeros`, and `sum_i weight_i x_i' g_i` as the cotangent of
`sum_zeros`. So inputs and cotangents of a layer are needed only while that layer is differentiated,
scans and checkpoints keep doing their work, and the cotangents g are the same in both passes.
`_streamed_leaf.py` says what is read and summed.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dpoptax.per_example._norm_rules import Factors
from dpoptax.per_example._primitives import run_equation
from dpoptax.per_example._streamed_leaf import Message, StreamedLeaf
from dpoptax.per_example._tracing.interpreter import LinearUse
from dpoptax.per_example._tracing.site import EqnPath, Site
from dpoptax.per_example._tracing.taps import Saved, Taps
from dpoptax.per_example._tracing.visitors import TapRunner


class SiteZeros(NamedTuple):
    """The zeros that a streamed site receives.

    Attributes:
        readings: what the first backward pass reads of each example, such as a norm.
        total: of the sum, float32 or wider.
    """

    readings: Any
    total: Array


def zeros_of(specs: Any, *axes: int) -> Any:
    """Returns zeros with these shapes and dtypes, after some leading axes."""
    return jax.tree.map(lambda spec: jnp.zeros((*axes, *spec.shape), spec.dtype), specs)


def zeros_key(site: Site) -> EqnPath:
    """Returns the key of a site's zeros among the taps; no equation has a negative number."""
    return (*site.path, -1)


class StreamRunner(TapRunner):
    """Saves the operands of some sites, and runs the others as streamed sites."""

    def __init__(
        self,
        kept: tuple[Site, ...],
        streamed: dict[EqnPath, StreamedLeaf],
        fallback_reasons: dict[int, str],
    ) -> None:
        super().__init__(kept, fallback_reasons)
        self._streamed = streamed

    def run_linear_use(
        self, uses: Sequence[LinearUse], values: Sequence[Any], taps: Taps
    ) -> tuple[list[Any], Saved]:
        """Runs the equation; saves the zeros whose cotangent is the message."""
        use = uses[0]
        if use.path not in self._streamed:
            return super().run_linear_use(uses, values, taps)
        leaf = self._streamed[use.path]
        output, zeros = _run_streamed(use, leaf, values, taps[zeros_key(leaf.site)])
        return [output], {use.path: tuple(jax.tree.leaves(zeros))}


def _run_streamed(
    use: LinearUse, leaf: StreamedLeaf, values: Sequence[Any], zeros: SiteZeros
) -> tuple[Array, Message]:
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
    def of_batch(others: list[Any], parameter: Array, zeros: SiteZeros) -> tuple[Array, Message]:
        batch = jax.tree.leaves(zeros.readings)[0].shape[0]
        return run(others, parameter), zeros_of(leaf.message, batch)

    def forward(others: list[Any], parameter: Array, zeros: SiteZeros) -> Any:
        inputs = [*others[: use.position], parameter, *others[use.position :]]
        saved = tuple(inputs[i] for i in use.linear.saved_operands[use.position])
        numbers = [None if _is_float(value) else value for value in others]
        return of_batch(others, parameter, zeros), (saved, parameter, numbers)

    def backward(residuals: Any, cotangents: Any) -> Any:
        (saved, parameter, numbers), (cotangent, message) = residuals, cotangents
        factors = Factors(saved, cotangent)
        found = SiteZeros(leaf.read(factors, message), leaf.add_up(factors, message))
        return _pull_operands(run, specs, numbers, parameter, cotangent), None, found

    of_batch.defvjp(forward, backward)

    # The rules need the whole batch at once: to sum over it, and to split it into chunks. So the
    # function of one example has its own rule for `vmap`.
    @jax.custom_batching.custom_vmap
    def of_example(others: list[Any], parameter: Array, zeros: SiteZeros) -> tuple[Array, Message]:
        rows, readings = jax.tree.map(
            lambda leaf: jnp.asarray(leaf)[None], (others, zeros.readings)
        )
        outputs = of_batch(rows, parameter, SiteZeros(readings, zeros.total))
        return jax.tree.map(lambda leaf: leaf[0], outputs)

    @of_example.def_vmap
    def _(axis_size: int, in_batched: Any, others: Any, parameter: Any, zeros: Any) -> Any:
        def rows(leaf: Any, batched: bool) -> Any:
            return leaf if batched else jnp.broadcast_to(leaf, (axis_size, *jnp.shape(leaf)))

        others_batched, parameter_batched, zeros_batched = in_batched
        assert not parameter_batched, "a parameter has no batch axis"
        others = jax.tree.map(rows, others, others_batched)
        readings = jax.tree.map(rows, zeros.readings, zeros_batched.readings)
        outputs = of_batch(others, parameter, SiteZeros(readings, zeros.total))
        return outputs, jax.tree.map(lambda _: True, outputs)

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
