"""The sum of clipped gradients, with the edge cases of JAX Privacy's clip."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import attrs
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from dpoptax._explicit_axes import run_with_automatic_axes, sharded_like
from dpoptax._pytree import PyTree
from dpoptax.clipping._bound import SMALLEST_CLIP
from dpoptax.compat._jax_privacy_call import CallLayout
from dpoptax.per_example import PerExampleGrads, value_and_per_example_grads
from dpoptax.per_example._base import global_squared_norms
from dpoptax.per_example._stacked import as_per_example_grads


@attrs.frozen(eq=False)
class ClipWeights:
    """From squared norms to the factor of each example in the sum.

    A bound of zero gives zero, or unit vectors if the sum is rescaled. An infinite one changes
    nothing, or gives zero if the sum is rescaled.

    Attributes:
        l2_clip_norm: the bound on the norm. It may be a traced array.
        rescale_to_unit_norm: divide by the bound.
        normalize_by: divide by this number.
    """

    l2_clip_norm: Any
    rescale_to_unit_norm: bool
    normalize_by: float

    def __call__(self, squared_norms: PyTree[Array]) -> Array:
        """Returns the factors `(batch,)`, zero for a norm that is not finite."""
        squared = global_squared_norms(squared_norms)
        norms = jnp.sqrt(squared)
        bound = jnp.maximum(jnp.asarray(self.l2_clip_norm, norms.dtype), 0)
        scale = jnp.minimum(1, bound / norms)
        # The squares of smaller norms vanish in float32, so these norms cannot be relied on.
        is_tiny, is_known = bound < SMALLEST_CLIP, norms >= SMALLEST_CLIP
        if self.rescale_to_unit_norm:
            scale = jnp.where(is_tiny, jnp.where(is_known, 1 / norms, 0), scale / bound)
        else:
            scale = jnp.where(is_tiny, 0, scale)
        # Here and not after the sum, where one more rounding would depend on all examples.
        scale = scale / self.normalize_by
        return jnp.where(jnp.isfinite(squared) & (scale >= 0), scale, 0)


@attrs.frozen
class Output:
    """What is returned beside the sum.

    Attributes:
        aux_type: a named tuple of `values`, `grad_norms` and `aux`.
        has_aux: whether to return the auxiliary outputs of the function.
        values: whether to return the losses.
        grad_norms: whether to return the norms.
    """

    aux_type: Any
    has_aux: bool
    values: bool
    grad_norms: bool


@attrs.frozen(eq=False)
class ClippedGradient:
    """The function of a batch that returns the sum of clipped gradients.

    Attributes:
        fun: the loss, with the arguments of a call.
        layout: which of them are trained, and which have a batch axis.
        weights: the clip.
        transform: a function of the gradient of one example.
        microbatch_size: how many examples are processed at a time.
        dtype: the type of the sum; None for that of the parameters, or float32 if it is narrower.
        output: what is returned beside the sum.
    """

    fun: Callable[..., Any]
    layout: CallLayout
    weights: ClipWeights
    transform: Callable[[PyTree], PyTree]
    microbatch_size: int | None
    dtype: Any
    output: Output

    def __call__(self, *args: Any, is_padding_example: Any = None, **kwargs: Any) -> Any:
        """Returns the sum for one batch, or a pair of it and the outputs of each example."""
        given = self.layout.split(args, kwargs)
        size = len(jax.tree.leaves(given.rows)[0])
        mask = None if is_padding_example is None else _real_rows(is_padding_example, size)
        transform = self.transform if _changes(self.transform, given.params) else None
        arguments = (given.params, given.rows, given.shared, mask)
        total, outputs = run_with_automatic_axes(
            functools.partial(self._compute, transform),
            *arguments,
            specs_of=_shardings(None if transform else given.params, given.rows),
        )
        returned = self.output.has_aux or self.output.values or self.output.grad_norms
        return (total, outputs) if returned else total

    def _compute(
        self, transform: Any, params: PyTree, rows: PyTree, shared: PyTree, mask: Any
    ) -> tuple[PyTree, Any]:
        grads_fn = value_and_per_example_grads(
            LossOfRow(self.fun, self.layout, shared),
            form="auto" if transform is None else "stacked",
            microbatch_size=self.microbatch_size,
            # Such a parameter gets noise and nothing else, as in JAX Privacy.
            allow_unused=True,
            has_aux=self.output.has_aux,
        )
        # Without the mask: what is returned beside the sum has all rows, as in JAX Privacy.
        values, grads = grads_fn(params, rows)
        values, aux = values if self.output.has_aux else (values, None)
        real = grads if mask is None else dataclasses.replace(grads, mask=grads.mask & mask)  # type: ignore[type-var]
        total = clip_and_sum(real, self.weights, transform)
        if self.dtype is not None:
            total = jax.tree.map(lambda leaf: leaf.astype(self.dtype), total)
        outputs = self.output.aux_type(
            values=values if self.output.values else None,
            grad_norms=jnp.sqrt(grads.global_squared_norms()) if self.output.grad_norms else None,
            aux=aux,
        )
        if self.layout.keep_batch_dim:
            outputs = jax.tree.map(_without_axis_of_one, outputs)
        return total, outputs


@attrs.frozen(eq=False)
class LossOfRow:
    """The loss of one example.

    Attributes:
        fun: the loss, with the arguments of a call.
        layout: which of them are trained, and which have a batch axis.
        shared: the arguments that are the same for all examples.
    """

    fun: Callable[..., Any]
    layout: CallLayout
    shared: dict[int, Any]

    def __call__(self, params: PyTree, row: PyTree) -> Any:
        """Returns the loss, or a pair of it and auxiliary outputs."""
        args, kwargs = self.layout.join(params, row, self.shared)
        return self.fun(*args, **kwargs)

    def call_note(self, row: PyTree, keys: Any) -> str:
        """What is added to an error from inside the function."""
        del keys
        batch = row["batch"] if isinstance(row, dict) else {}
        shapes = jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", batch)
        taken = "a batch of one example" if self.layout.keep_batch_dim else "one row"
        return (
            f"dpoptax called fun with {taken}. Without the axis of the batch, the arguments in "
            f"batch_argnums have the shapes {shapes}. keep_batch_dim="
            f"{not self.layout.keep_batch_dim} calls it in the other way."
        )


def clip_and_sum(
    grads: PerExampleGrads, weights_of: ClipWeights, transform: Callable[[PyTree], PyTree] | None
) -> PyTree:
    """Returns the clipped sum, in float32 or wider; of transformed gradients if asked to."""
    if transform is None:
        return grads.clip_and_sum(weights_of)

    def of_part(part: PerExampleGrads) -> PyTree:
        stacked = as_per_example_grads(jax.vmap(transform)(part.stacked()))
        # Padded rows are zero, and a transformation may turn zeros into anything.
        changed = dataclasses.replace(stacked, mask=part.mask)  # type: ignore[type-var]
        return changed.weighted_sum(weights_of(changed.squared_norms()))

    return grads.sum_by_parts(of_part)


def wide_sum_dtype(dtype: Any) -> Any:
    """Returns the type of the sum; raises for one below 32 bits.

    Rounded to 16 bits, the sum would move by up to one unit in the last place of each number if an
    example is added: more than the clip bound, in a large model.
    """
    if dtype is None:
        return None
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 32:
        raise ValueError(
            "dtype must be float32 or wider, because noise is added to the sum later and rounding "
            f"before that breaks the sensitivity; got {jnp.dtype(dtype)}. Leave it out, and "
            "convert after the noise."
        )
    return jax.dtypes.canonicalize_dtype(dtype)


def _real_rows(is_padding_example: Any, size: int) -> Array:
    padding = jnp.asarray(is_padding_example)
    if padding.dtype != jnp.bool_:
        raise TypeError(
            f"is_padding_example must be boolean, True for padding; got {padding.dtype}. Pass "
            "is_padding_example.astype(bool)."
        )
    if padding.shape != (size,):
        raise ValueError(
            f"is_padding_example must have shape ({size},), one entry per row; got "
            f"{padding.shape}. Pass that of this batch."
        )
    return ~padding


def _changes(transform: Callable[[PyTree], PyTree], params: PyTree) -> bool:
    """Whether a function of a gradient does more than to return it."""
    found = []

    def watch(grad: PyTree) -> PyTree:
        result = transform(grad)
        structures: list[Any] = [jax.tree.structure(tree) for tree in (grad, result)]
        same = structures[0] == structures[1]
        pairs = zip(jax.tree.leaves(grad), jax.tree.leaves(result), strict=False)
        found.append(not same or any(old is not new for old, new in pairs))
        return result

    jax.eval_shape(watch, params)
    return found[0]


def _without_axis_of_one(leaf: Array) -> Array:
    # As JAX Privacy does: the axis is that of the batch of one example.
    return jnp.squeeze(leaf, 1) if leaf.ndim > 1 and leaf.shape[1] == 1 else leaf


def _shardings(params: PyTree | None, rows: PyTree) -> Callable[[PyTree], PyTree]:
    """Returns how results are sharded on a mesh with explicit axes: as parameters and rows are."""

    def specs_of(results: PyTree) -> PyTree:
        total, outputs = results
        sharding = jax.typeof(jax.tree.leaves(rows)[0]).sharding
        by_row = PartitionSpec(*sharding.spec[:1])
        return sharded_like(params)(total), jax.tree.map(lambda _: by_row, outputs)

    return specs_of
