"""Per-example gradients of a batch: the interface that clipping needs, for every form."""

import abc
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dpoptax import _call_stack
from dpoptax._pytree import PyTree

# From squared norms, `(batch,)` per leaf, to the weights of the examples: one array `(batch,)`, or
# a tree prefix of the parameters with one array per group of leaves.
WeightsOf: TypeAlias = Callable[[PyTree[Array]], PyTree[Array]]


class Values(NamedTuple):
    """What a loss returns for the examples of a batch. Not private.

    Attributes:
        losses: `(batch,)`.
        aux: the leaves of the auxiliary outputs, `(batch, ...)`.
    """

    losses: Array
    aux: list[Array]


class PerExampleGrads(abc.ABC):
    """The gradients of all examples of a batch: a pytree to pass to `privatize`.

    A form may hold one array per parameter with a leading example axis, or factors that give norms
    and sums without `batch x params` numbers in memory. Not private: nothing in here is clipped or
    noised.

    It is a pytree, so that it can be an argument or a result of a compiled function. Its leaves are
    not gradients: functions of Optax and `jax.tree.map` refuse them. For arrays to compute with,
    call `stacked()`.

    Attributes:
        mask: bool `(batch,)`; True marks a real example, False a padded row.

    Example:
        >>> import jax, jax.numpy as jnp, dpoptax
        >>> loss_fn = lambda w, x: 0.5 * jnp.sum((w - x) ** 2)
        >>> grads = dpoptax.per_example_grads(loss_fn)(jnp.zeros(2), jnp.ones((3, 2)))
        >>> grads.squared_norms()
        Array([2., 2., 2.], dtype=float32)
        >>> grads.weighted_sum(jnp.array([1.0, 1.0, 0.0]))
        Array([-2., -2.], dtype=float32)
    """

    mask: Array

    if TYPE_CHECKING:
        # Optax's type of updates is nested iterables of arrays. So a type checker must take this
        # for one; at run time nobody iterates over it.
        def __iter__(self) -> Iterator[Array]: ...

    def __contains__(self, name: object) -> bool:
        """Returns False: Flax's `TrainState` checks whether gradients contain a collection."""
        return False

    def __repr__(self) -> str:
        """Names the form only. Errors of JAX print what they got, and the gradients are private."""
        return f"<{type(self).__name__}: per-example gradients, not private>"

    @abc.abstractmethod
    def squared_norms(self) -> PyTree[Float[Array, " batch"]]:
        """Returns the squared L2 norm of every example's gradient, for each parameter leaf.

        Each leaf is float32 `(batch,)`, or float64 for float64 parameters. It is zero for padded
        rows, and not finite where the gradient is not finite.
        """

    def global_squared_norms(self) -> Float[Array, " batch"]:
        """Returns the squared L2 norm of every example's whole gradient: the sum over leaves."""
        return global_squared_norms(self.squared_norms())

    @abc.abstractmethod
    def weighted_sum(self, weights: PyTree[Float[Array, " batch"]]) -> PyTree[Float[Array, "..."]]:
        """Returns `sum_i weights_i * gradient_i`, a tree like the parameters, in float32 or wider.

        An example with zero weight, or a padded row, adds exactly zero, even if its gradient is
        NaN. To clip, call `clip_and_sum`: it computes norms and sum from the same numbers, also
        where microbatches are computed again for the sum.

        Args:
            weights: `(batch,)`; or a tree prefix of the parameters, with one such array per group
                of parameters. A zero then leaves out that group of that example. Neither costs a
                further pass.

        Raises:
            ValueError: the weights are no prefix of the parameters, or have another shape.
        """

    def clip_and_sum(self, weights_of: WeightsOf) -> PyTree[Float[Array, "..."]]:
        """Returns `weighted_sum(weights_of(squared_norms()))`, in one pass if that is cheaper.

        The weight of an example may depend only on its own norms: a form may call `weights_of` on
        a part of the batch at a time.
        """
        return self.sum_by_parts(lambda part: part.weighted_sum(weights_of(part.squared_norms())))

    def sum_by_parts(self, function: Callable[["PerExampleGrads"], PyTree]) -> PyTree:
        """Returns the sum of `function(part)` over parts of the batch: one part, or microbatches.

        `function` must treat each example alone, and return zero for padding: a part with only
        padding may be skipped.
        """
        return self.sum_with_rows(lambda part, _: function(part), None)

    def sum_with_rows(
        self, function: Callable[["PerExampleGrads", Any], PyTree], rows: PyTree
    ) -> PyTree:
        """As `sum_by_parts`, for a function that also gets its part of `rows`.

        `rows` is a tree of arrays with a leading axis of the batch.
        """
        return function(self, rows)

    def readings(self) -> Any:
        """Returns what passes over the batch have found out, for a form that makes passes."""
        return None

    def remember(self, readings: Any) -> None:
        """Stores `readings`, for a form that makes passes."""
        return None

    @abc.abstractmethod
    def stacked(self) -> PyTree[Float[Array, "batch ..."]]:
        """Returns a plain tree of `(batch, *leaf.shape)` arrays, zero for padded rows."""

    @abc.abstractmethod
    def parameter_specs(self) -> PyTree:
        """Returns the shape and dtype of every parameter, as a tree of `jax.ShapeDtypeStruct`."""


def global_squared_norms(
    squared_norms: PyTree[Float[Array, " batch"]],
) -> Float[Array, " batch"]:
    """Sums squared norms over the leaves. Sensitivity depends on it: no leaf may be left out."""
    leaves = jax.tree.leaves(squared_norms)
    # The norms of float32 leaves and those of float64 leaves may come together.
    wide = any(leaf.dtype == jnp.float64 for leaf in leaves)
    return jnp.stack([leaf.astype(jnp.float64) if wide else leaf for leaf in leaves]).sum(axis=0)


def select(kept: Bool[Array, " batch"], leaf: Array, other: float = 0.0) -> Array:
    """Keeps the rows that are True in `kept`, and replaces the others, NaN included."""
    # Not a product: zero times NaN is NaN.
    rows = kept.reshape(-1, *[1] * (leaf.ndim - 1))
    return jnp.where(rows, leaf, jnp.asarray(other, leaf.dtype))


Form = TypeVar("Form", bound=type)


def register_form(cls: Form) -> Form:
    """Registers a dataclass of per-example gradients as a pytree that nobody computes with.

    A field with `metadata={"static": True}` belongs to the structure.

    The pytree refuses to be taken apart by Optax or by `jax.tree.map`. Both would change factors,
    and not gradients, and whatever Optax computes here is computed before the clip.
    """
    fields = dataclasses.fields(cls)
    static = tuple(field.name for field in fields if field.metadata.get("static"))
    children = tuple(field.name for field in fields if not field.metadata.get("static"))

    def structure_of(grads: Any) -> tuple[Any, ...]:
        _refuse_computing_with_leaves()
        return tuple(getattr(grads, name) for name in static)

    def flatten(grads: Any) -> tuple[Any, Any]:
        return tuple(getattr(grads, name) for name in children), structure_of(grads)

    def flatten_with_keys(grads: Any) -> tuple[Any, Any]:
        keyed = [(jax.tree_util.GetAttrKey(name), getattr(grads, name)) for name in children]
        return keyed, structure_of(grads)

    def unflatten(structure: Any, values: Any) -> Any:
        # Without `__init__`: JAX also fills a structure with what is no array.
        grads: Any = object.__new__(cls)
        for name, value in zip((*children, *static), (*values, *structure), strict=True):
            object.__setattr__(grads, name, value)
        return grads

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def _refuse_computing_with_leaves() -> None:
    caller = _call_stack.optax_caller()
    if caller is not None:
        raise ValueError(
            f"privatize must come first and outermost; got optax.{caller}, which computes with "
            "per-example gradients before they are clipped. Use "
            "optax.chain(privatize(...), other_transformations)."
        )
    if _call_stack.maps_over_leaves():
        raise ValueError(
            "privatize must come first; got jax.tree.map over per-example gradients, whose leaves "
            "are factors of gradients. Pass them to privatize as they are, and compute with what "
            "it releases. For a larger batch in parts, use per_example_grads(microbatch_size=...). "
            "For arrays of shape (batch, ...), call grads.stacked()."
        )
