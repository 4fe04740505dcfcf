"""Products of rows with the matrix of their group, as in a mixture of experts, under `vmap`.

JAX has no rule for `vmap` of `jax.lax.ragged_dot` by a shared weight. Here rows say their group
instead of being sorted by it. So the rows of a batch are simply more rows.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dpoptax.per_example._devices import current_device


def _sorts() -> bool:
    """Whether rows are sorted by group, for the `ragged_dot` of the device."""
    return not current_device().is_cpu


def group_of_rows(group_sizes: Any, num_rows: int) -> Int[Array, " rows"]:
    """Returns the group of each row, if groups of these sizes come one after the other.

    Rows beyond the last group get the number of groups, and belong to none.
    """
    # A narrow type may be too small for the sum of the sizes.
    ends = jnp.cumsum(group_sizes.astype(jnp.int32))
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    return jnp.sum(rows[:, None] >= ends, axis=1, dtype=jnp.int32)


def ragged_product(
    rows: Array, weights: Array, group_sizes: Any, *, precision: Any, dtype: Any
) -> Array:
    """`jax.lax.ragged_dot` of `(rows, k)` and `(groups, k, n)`, also under `vmap` and `grad`."""
    return _differentiable(
        rows, weights, group_of_rows(group_sizes, rows.shape[0]), precision, dtype
    )


def _differentiable(
    rows: Array, weights: Array, groups: Array, precision: Any, dtype: Any
) -> Array:
    @jax.custom_vjp
    def run(rows: Array, weights: Array, groups: Array) -> Array:
        return grouped_product(rows, weights, groups, precision, dtype)

    def forward(rows: Array, weights: Array, groups: Array) -> Any:
        return run(rows, weights, groups), (rows, weights, groups)

    def backward(residuals: Any, cotangent: Array) -> Any:
        rows, weights, groups = residuals
        num_groups, transposed = weights.shape[0], weights.swapaxes(1, 2)
        by_rows = grouped_product(cotangent, transposed, groups, precision, dtype)
        by_weights = grouped_outer(rows, cotangent, groups, num_groups, precision, dtype)
        return by_rows.astype(rows.dtype), by_weights.astype(weights.dtype), None

    run.defvjp(forward, backward)
    return run(rows, weights, groups)


def grouped_product(
    rows: Array, weights: Array, groups: Array, precision: Any, dtype: Any
) -> Array:
    """Multiplies each row `(k,)` by the matrix `(k, n)` of its group; zeros without a group."""

    @jax.custom_batching.custom_vmap
    def run(rows: Array, weights: Array, groups: Array) -> Array:
        product = _product_by_sorting if _sorts() else _product_by_loop
        return product(rows, weights, groups, precision, dtype)

    @run.def_vmap
    def _(size: int, batched: Any, rows: Array, weights: Array, groups: Array) -> Any:
        rows, groups = (
            leaf if is_batched else jnp.broadcast_to(leaf, (size, *leaf.shape))
            for leaf, is_batched in zip((rows, groups), (batched[0], batched[2]), strict=True)
        )
        if batched[1]:
            # One example after the other, so that memory is bounded.
            return jax.lax.map(lambda one: run(*one), (rows, weights, groups)), True
        joined = run(rows.reshape(-1, rows.shape[-1]), weights, groups.reshape(-1))
        return joined.reshape(*rows.shape[:2], joined.shape[-1]), True

    return run(rows, weights, groups)


def grouped_outer(
    rows: Array, cotangents: Array, groups: Array, num_groups: int, precision: Any, dtype: Any
) -> Array:
    """Returns the gradient by the weights, `(groups, k, n)`: `A'G` of the rows of each group."""

    @jax.custom_batching.custom_vmap
    def run(rows: Array, cotangents: Array, groups: Array) -> Array:
        outer = _outer_by_sorting if _sorts() else _outer_by_loop
        return outer(rows, cotangents, groups, num_groups, precision, dtype)

    @run.def_vmap
    def _(size: int, batched: Any, *values: Array) -> Any:
        values = tuple(
            value if is_batched else jnp.broadcast_to(value, (size, *value.shape))
            for value, is_batched in zip(values, batched, strict=True)
        )
        return jax.lax.map(lambda one: run(*one), values), True

    return run(rows, cotangents, groups)


# XLA for a CPU multiplies all rows by all matrices, and JAX holds the rows once per group for that.
# A loop over the groups multiplies as much and holds them once.


def _product_by_loop(
    rows: Array, weights: Array, groups: Array, precision: Any, dtype: Any
) -> Array:
    def add_group(total: Array, group: Any) -> tuple[Array, None]:
        number, weight = group
        product = jnp.matmul(rows, weight, precision=precision, preferred_element_type=dtype)
        return jnp.where((groups == number)[:, None], product, total), None

    zeros = jnp.zeros((rows.shape[0], weights.shape[2]), dtype)
    return jax.lax.scan(add_group, zeros, (jnp.arange(weights.shape[0]), weights))[0]


def _outer_by_loop(
    rows: Array, cotangents: Array, groups: Array, num_groups: int, precision: Any, dtype: Any
) -> Array:
    def of_group(number: Array) -> Array:
        here = (groups == number)[:, None]
        # Both are selected, since zero times NaN is NaN.
        ours, theirs = (jnp.where(here, leaf, 0) for leaf in (rows, cotangents))
        return jnp.matmul(ours.T, theirs, precision=precision, preferred_element_type=dtype)

    return jax.lax.map(of_group, jnp.arange(num_groups))


def _product_by_sorting(
    rows: Array, weights: Array, groups: Array, precision: Any, dtype: Any
) -> Array:
    order, sizes = _sort(groups, weights.shape[0])
    products = jax.lax.ragged_dot(
        rows[order], weights, sizes, precision=precision, preferred_element_type=dtype
    )
    products = jnp.zeros_like(products).at[order].set(products, unique_indices=True)
    return jnp.where((groups < weights.shape[0])[:, None], products, 0)


def _outer_by_sorting(
    rows: Array, cotangents: Array, groups: Array, num_groups: int, precision: Any, dtype: Any
) -> Array:
    order, sizes = _sort(groups, num_groups)
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    return jax.lax.ragged_dot_general(
        rows[order],
        cotangents[order],
        sizes,
        numbers,
        precision=precision,
        preferred_element_type=dtype,
    )


def _sort(groups: Array, num_groups: int) -> tuple[Array, Array]:
    """Returns the order of the rows by their group, and the sizes of the groups."""
    return jnp.argsort(groups), jnp.bincount(groups, length=num_groups).astype(jnp.int32)
