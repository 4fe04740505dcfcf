"""Non-private diagnostics of a step: gradient norms, and examples that are not finite."""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from dpoptax._explicit_axes import replicated_results
from dpoptax.clipping import ClipRule, StatefulClipRule
from dpoptax.clipping._state import AnyClipRule
from dpoptax.per_example import PerExampleGrads
from dpoptax.per_example._base import global_squared_norms
from dpoptax.transforms._privatize import PrivatizeState

# A few bad rows are usual in real data. More than this fraction and this number hint at a mistake.
MANY, AT_LEAST = 0.05, 10


def rule_of_step(clip: AnyClipRule, opt_state: optax.OptState) -> ClipRule:
    """Returns the clip rule of the step that starts from a state.

    Raises:
        ValueError: the rule has state, and `opt_state` is that of another rule.
    """
    if not isinstance(clip, StatefulClipRule):
        return clip
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, PrivatizeState))
    found = [node.clip_state for node in leaves if isinstance(node, PrivatizeState)]
    structures: list[Any] = [jax.tree.structure(state) for state in found[:1]]
    if structures != [jax.tree.structure(jax.eval_shape(clip.init))]:
        raise ValueError(
            f"expected the state of the clip rule {type(clip).__name__} in the state of the "
            "optimizer; got a state without it. Pass the clip rule of tx as diagnostics."
        )
    return clip.at(found[0])


@replicated_results
def nonprivate_norms(
    grads: PerExampleGrads,
    clip: ClipRule,
    step: Int[Array, ""] | int = 0,
    mask: Bool[Array, " batch"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the clipped fraction of a batch and its median gradient norm. Not private.

    An example counts as clipped if at least one of its weights is below 1. An empty batch gives
    NaN. A mask leaves out more rows than those that are padding, such as canaries.

    Example:
        >>> import jax.numpy as jnp
        >>> from dpoptax.clipping import FlatClip
        >>> from dpoptax.per_example._stacked import as_per_example_grads
        >>> grads = {"w": jnp.array([[0.3, 0.4], [3.0, 4.0], [0.0, 6.0]])}  # norms .5, 5, 6
        >>> grads = as_per_example_grads(grads)
        >>> [round(float(number), 2) for number in nonprivate_norms(grads, FlatClip(1.0))]
        [0.67, 5.0]
    """
    mask = grads.mask if mask is None else mask
    squared = grads.squared_norms()
    norms = jnp.sqrt(global_squared_norms(squared).astype(jnp.float32))
    # Padding belongs to nobody. A gradient that is not finite has weight zero, so it counts.
    groups = [weights < 1 for weights in jax.tree.leaves(clip.weights(squared, step))]
    clipped = mask & functools.reduce(jnp.logical_or, groups)
    size = jnp.sum(mask, dtype=jnp.float32)
    median = jnp.nanmedian(jnp.where(mask, norms, jnp.nan))
    return jnp.sum(clipped, dtype=jnp.float32) / size, median


def nonprivate_nonfinite(
    losses: Float[Array, " batch"], mask: Bool[Array, " batch"], grads: PerExampleGrads | None
) -> Int[Array, ""]:
    """Returns how many examples have a loss, or a gradient if given, that is not finite.

    Not private. A gradient that is not finite adds nothing to the clipped sum.
    """
    finite = jnp.isfinite(losses)
    if grads is not None:
        finite = finite & jnp.isfinite(global_squared_norms(grads.squared_norms()))
    return jnp.sum(mask & ~finite, dtype=jnp.int32)


def warn_if_many(nonfinite: tuple[int, int] | None) -> None:
    """Warns if many of the drawn examples were not finite; `nonfinite` counts them and all."""
    if nonfinite is not None and nonfinite[0] > max(MANY * nonfinite[1], AT_LEAST):
        # No numbers: who wants them asks for diagnostics, which are not private.
        warnings.warn(
            f"the loss of more than {MANY:.0%} of the drawn examples was not finite. A gradient "
            "that is not finite is left out. This warning is not private. Look for missing values, "
            "token ids out of range, and logarithms or divisions at zero. "
            "fit(..., diagnostics=True) counts such examples at each step, and "
            "result.nonprivate_nonfinite_count has the total.",
            UserWarning,
            stacklevel=5,
        )
