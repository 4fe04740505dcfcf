"""Augmentation multiplicity: the mean loss over several random views of one example.

The gradient of this loss is the mean of the gradients of the views. It is clipped as one gradient,
so an example contributes as much as without augmentation: De et al. 2022 (arXiv:2204.13650).
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dpoptax import _jax_compat, _validate
from dpoptax._pytree import PyTree
from dpoptax.per_example import _validate_loss as validation
from dpoptax.per_example._call_note import describe, refuse_no_function
from dpoptax.per_example._primitives import has_vmap_rules

# `augment(key, example) -> view`: a random variant of one example, of the same structure.
Augment: TypeAlias = Callable[[Array, PyTree], PyTree]
# Names that say that an argument is a key.
_KEYS = ("key", "rng", "rng_key", "prng_key")


def average_views(
    loss_fn: Callable[..., Any],
    augment: Augment,
    num_views: int,
    *,
    keep_original: bool = False,
) -> Callable[..., Any]:
    """Returns a loss of one example: the mean of `loss_fn` over random views of the example.

    loss(params, example, key) = mean over k of loss_fn(params, augment(key_k, example))

    This is a loss like any other. Pass it to `per_example_grads`, `explain`, `fit` or `PrivateRun`.
    One example still contributes at most the clip bound, so clip, noise and epsilon do not change.
    A step costs about as much as one on `num_views` times as many examples.

    `augment` sees one example only. Mixing two examples, as mixup and CutMix do, has no per-example
    gradient: do not close over the data to do so.

    Args:
        loss_fn: `loss_fn(params, example)` or `loss_fn(params, example, key)`: the scalar loss of
            one example, or a pair `(loss, aux)`. Each view gets its own key.
        augment: `augment(key, example)` returns a random view of one example, without a batch axis.
            The view has the structure and the shapes of the example, so a crop must be as large as
            the image: pad the image first. It must be a pure function that JAX can trace.
        num_views: how many views of each example, at least 1.
        keep_original: the first of the views is the example itself.

    Returns:
        A function `(params, example, key)` that returns the mean loss. If `loss_fn` returns a pair,
        it returns the mean loss and the means of `aux` over the views.

    Raises:
        TypeError: `loss_fn` or `augment` is not a function of the arguments above, or `num_views`
            is no whole number; (from the returned function) a view contains something other than
            arrays, or `loss_fn` returns no real number.
        ValueError: `num_views` is below 1; (from the returned function) a view has another
            structure or shape than the example, or `loss_fn` does not return a scalar.

    Example:
        >>> import dpoptax, jax, jax.numpy as jnp
        >>> loss_fn = lambda w, x: 0.5 * jnp.sum((w - x) ** 2)
        >>> flip = lambda key, x: jnp.where(jax.random.bernoulli(key), x[::-1], x)
        >>> loss = average_views(loss_fn, flip, num_views=4)
        >>> grads_fn = dpoptax.per_example_grads(loss)
        >>> grads = grads_fn(jnp.zeros(2), jnp.array([[1.0, 2.0]]), key=jax.random.key(1))
        >>> grads.stacked()
        Array([[-1.5, -1.5]], dtype=float32)
    """
    num_views = _validate.count("num_views", num_views)
    needs_key = validation.takes_key(loss_fn)
    refuse_no_function(augment, "augment")
    _refuse_other_arguments(augment)

    def mean_loss(params: PyTree, example: PyTree, key: Array) -> Any:
        example = jax.tree.map(jnp.asarray, example)
        view_key, loss_key = jax.random.split(_validate.typed_key("key", key))
        views = _views(augment, example, view_key, num_views, keep_original=keep_original)
        keys = (jax.random.split(loss_key, num_views),) if needs_key else ()
        trace = validation.check_loss(
            loss_fn, params, views, loss_key if needs_key else None, has_aux=None, allow_unused=True
        )
        if _has_no_vmap(trace.program.jaxpr):
            losses, aux = jax.lax.map(
                lambda inputs: trace.unchanged(params, *inputs), (views, *keys)
            )
        else:
            # Unchanged, because the result is a loss that is traced again.
            losses, aux = jax.vmap(lambda *inputs: trace.unchanged(params, *inputs))(views, *keys)
        loss, aux = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), (losses, aux))
        treedef = trace.program.aux_treedef
        return loss if treedef is None else (loss, jax.tree.unflatten(treedef, aux))

    mean_loss.call_note = _call_note  # type: ignore[attr-defined]
    return mean_loss


def _refuse_other_arguments(augment: Augment) -> None:
    """Raises for an augmentation that does not take (key, example)."""
    try:
        signature = inspect.signature(augment)
    except (TypeError, ValueError):
        return  # some callables written in C have no signature
    names = list(signature.parameters)
    remedy = "Pass for example lambda key, example: augment(example, key)."
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise TypeError(
            f"augment is called with (key, example); got one that takes ({', '.join(names)}) "
            f"({error}). {remedy}"
        ) from None
    if names[1:2] and names[1] in _KEYS and names[0] not in _KEYS:
        raise TypeError(
            "augment is called with (key, example), the key first; got one that takes "
            f"({', '.join(names)}). {remedy}"
        )


def _has_no_vmap(jaxpr: Any) -> bool:
    """Whether the parameters of a loss would have no factors under `vmap` over the views."""
    equations = list(_jax_compat.equations(jaxpr))
    # `vmap` turns a `cond` into a selection, and has no rule for products by groups. A branch by
    # platform is chosen when the program is compiled.
    has_cond = any(
        eqn.primitive is jax.lax.cond_p and eqn.params.get("branches_platforms") is None
        for eqn in equations
    )
    return has_cond or not has_vmap_rules(equations)


def _call_note(example: PyTree, keys: Any) -> str:
    return "This is the loss of one view of an example, from dpoptax.average_views."


def _views(
    augment: Augment, example: PyTree, key: Array, num_views: int, *, keep_original: bool
) -> PyTree:
    """Returns the views of one example, with a leading axis of views."""

    def view_of(key: Array) -> PyTree:
        view = augment(key, example)
        _check_view(view, example, same_dtypes=keep_original)
        return jax.tree.map(jnp.asarray, view)

    keys = jax.random.split(key, num_views)
    if not keep_original:
        return jax.vmap(view_of)(keys)
    original = jax.tree.map(lambda leaf: leaf[None], example)
    if num_views == 1:
        return original
    drawn = jax.vmap(view_of)(keys[1:])
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), original, drawn)


def _check_view(view: PyTree, example: PyTree, *, same_dtypes: bool) -> None:
    """Raises unless a view looks like its example."""
    remedy = "Return a tree like the example, with the parts that do not change as they are."
    found: Any = jax.tree.structure(view)
    expected: Any = jax.tree.structure(example)
    if found != expected:
        raise ValueError(
            f"augment must return a view with the structure of the example, {expected}; got "
            f"{found}. {remedy}"
        )
    pairs = zip(jax.tree_util.tree_leaves_with_path(view), jax.tree.leaves(example), strict=True)
    for (path, leaf), original in pairs:
        name = f"view{jax.tree_util.keystr(path)}"
        if not hasattr(leaf, "dtype") and not isinstance(leaf, (bool, int, float, complex)):
            raise TypeError(
                f"augment must return arrays; got {_validate.described(leaf)} in {name}. {remedy}"
            )
        if jnp.shape(leaf) != original.shape:
            raise ValueError(
                f"augment must keep the shapes of the example ({describe(example)}); got "
                f"{jnp.shape(leaf)} in {name}. Augment one example, without a batch axis. For a "
                "random crop, pad the image first and crop to its old size."
            )
        if same_dtypes and jnp.result_type(leaf) != original.dtype:
            raise TypeError(
                f"with keep_original, augment must keep the dtypes of the example; got "
                f"{jnp.result_type(leaf)} in {name}, not {original.dtype}. Convert the data, or "
                "convert inside loss_fn."
            )
