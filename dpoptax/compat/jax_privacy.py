"""JAX Privacy's `clipped_grad` on top of dpoptax's per-example gradients.

It takes the arguments of `jax_privacy.clipped_grad` 2.0 and returns the same, so it can replace
that function in a program, in JAX Privacy's own trainers too. `docs/trainers/jax_privacy.md` shows
how, and lists what differs. JAX Privacy need not be installed.
"""

import numbers
from collections.abc import Callable, Sequence
from typing import Any

from dpoptax import _validate
from dpoptax._pytree import PyTree
from dpoptax.compat._jax_privacy_call import CallLayout
from dpoptax.compat._jax_privacy_sum import ClippedGradient, ClipWeights, Output, wide_sum_dtype
from dpoptax.compat._jax_privacy_types import BoundedSensitivity, result_types

__all__ = ["clipped_grad"]


def __dir__() -> list[str]:
    return __all__


def _unchanged(grad: PyTree) -> PyTree:
    return grad


def clipped_grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    l2_clip_norm: Any,
    rescale_to_unit_norm: bool = False,
    normalize_by: float = 1.0,
    batch_argnums: int | Sequence[int] = 1,
    keep_batch_dim: bool = True,
    return_values: bool = False,
    return_grad_norms: bool = False,
    pre_clipping_transform: Callable[[PyTree], PyTree] = _unchanged,
    microbatch_size: int | None = None,
    nan_safe: bool = True,
    dtype: Any = None,
    prng_argnum: int | None = None,
    spmd_axis_name: Any = None,
) -> BoundedSensitivity:
    """Returns a function that computes the sum of clipped per-example gradients of `fun`.

    Args:
        fun: the loss. It returns a scalar, or a pair `(scalar, aux)` with `has_aux`.
        argnums: the argument or arguments to differentiate with respect to.
        has_aux: whether `fun` returns a pair.
        l2_clip_norm: the bound on the L2 norm of one example's gradient. It may be an array.
        rescale_to_unit_norm: divide the clipped gradients by `l2_clip_norm`.
        normalize_by: divide the sum by this positive number.
        batch_argnums: the argument or arguments with a leading batch axis.
        keep_batch_dim: call `fun` with a batch of one example. If False, call it with a row of the
            batch arguments, which may be the group of all examples of one user.
        return_values: also return the losses. They are not private.
        return_grad_norms: also return the norms of the gradients before `pre_clipping_transform`
            and before clipping. They are not private.
        pre_clipping_transform: a function of the gradient of one example. It needs stacked
            gradients, `batch x params` numbers in memory: pass `microbatch_size` with it.
        microbatch_size: process this many examples at a time. It need not divide the batch size.
        nan_safe: ignored. An example with a gradient that is not finite always contributes zero.
        dtype: the type of the sum, float32 or wider. By default that of the parameters, and float32
            for narrower ones.
        prng_argnum: the argument with PRNG keys. They are split into one key per example.
        spmd_axis_name: ignored. The sharding of the arguments decides.

    Returns:
        A `BoundedSensitivityCallable`: a function with the arguments of `fun`, and
        `is_padding_example`, bool `(batch,)`. Other keyword arguments have one row per example. It
        returns the sum, a tree like the trained arguments, or a pair of it and a named tuple
        `(values, grad_norms, aux)` with one row per example; leave out the rows of padding.
        Its method `sensitivity(relation)` returns how far one example moves the sum.

    Raises:
        ValueError: a number out of range, argument numbers that overlap, a `dtype` below 32 bits,
            batch arguments of different sizes, or a loss that has no per-example gradient.
        TypeError: `is_padding_example` is not boolean, or a trained argument is not real
            floating-point.
        ImportError: another version of JAX Privacy is installed.

    Example:
        >>> import jax.numpy as jnp
        >>> loss = lambda params, x: 0.5 * jnp.mean((x - params) ** 2)
        >>> grad_fn = clipped_grad(loss, l2_clip_norm=3.0, return_grad_norms=True)
        >>> total, aux = grad_fn(3.0, jnp.array([0.0, 7.0, -2.0]))
        >>> total, aux.grad_norms
        (Array(3., dtype=float32), Array([3., 4., 5.], dtype=float32))
        >>> grad_fn.sensitivity()
        3.0
    """
    del nan_safe, spmd_axis_name
    trained = argnums if isinstance(argnums, int) else tuple(argnums)
    batched = (batch_argnums,) if isinstance(batch_argnums, int) else tuple(batch_argnums)
    divisor = _validate.positive("normalize_by", normalize_by)
    _refuse_bound(l2_clip_norm)
    callable_type, aux_type = result_types()
    gradient = ClippedGradient(
        fun=fun,
        layout=CallLayout(trained, batched, prng_argnum, keep_batch_dim),
        weights=ClipWeights(l2_clip_norm, rescale_to_unit_norm, divisor),
        transform=pre_clipping_transform,
        microbatch_size=microbatch_size,
        dtype=wide_sum_dtype(dtype),
        output=Output(aux_type, has_aux, return_values, return_grad_norms),
    )
    bound = (1.0 if rescale_to_unit_norm else l2_clip_norm) / divisor
    has_pair = has_aux or return_values or return_grad_norms
    result: BoundedSensitivity = callable_type(gradient, bound, has_pair)
    return result


def _refuse_bound(bound: Any) -> None:
    if isinstance(bound, numbers.Real) and not float(bound) >= 0:
        raise ValueError(f"l2_clip_norm bounds a norm and must be non-negative; got {bound}.")
